"""The networks, as plain ``nn.Module``s that know nothing of Pyro."""

from __future__ import annotations

from collections.abc import Callable

import timm
from torch import nn

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.nets import lenet, resnet, vgg, vit

_NETS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": lambda c, i, size, patch: resnet.resnet18(c, i),
    "resnet20": lambda c, i, size, patch: resnet.resnet20(c, i),
    "resnet110": lambda c, i, size, patch: resnet.resnet110(c, i),
    "vgg11": lambda c, i, size, patch: vgg.vgg11(c, i),
    "vgg19": lambda c, i, size, patch: vgg.vgg19(c, i),
    "vit_tiny": lambda c, i, size, patch: vit.vit("vit_tiny_patch16_224", c, i, size, patch),
    "vit_base": lambda c, i, size, patch: vit.vit("vit_base_patch16_224", c, i, size, patch),
    "lenet": lambda c, i, size, patch: lenet.LeNet(c, i, size),
}


def list_models() -> list[str]:
    """Names that :func:`create_model` builds, besides ``timm:NAME``.

    >>> "resnet18" in list_models()
    True
    """
    return sorted(_NETS)


def check_name(name: str) -> None:
    """Raise a one-line :class:`UserError` unless ``name`` is a known network."""
    if name.startswith("timm:"):
        if not timm.is_model(name[5:]):
            raise unknown("timm model", name[5:], timm.list_models())
    elif name not in _NETS:
        raise unknown("arch", name, [*list_models(), "timm:NAME"])


def create_model(
    name: str, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, patch_size: int | None = None
) -> nn.Module:
    """Build a network by name for ``[batch, in_channels, image_size, image_size]`` inputs (paper §2).

    ``timm:NAME`` builds any timm classifier with its own initialisation; the other networks start at PyTorch's
    Kaiming-uniform. ``patch_size`` is for the ViTs alone. Raises ``UserError`` for an unknown name.

    >>> sum(p.numel() for p in create_model("resnet20").parameters())
    272474
    """
    check_name(name)
    if patch_size is not None and not name.startswith("vit_"):
        raise UserError(f"patch_size is an option of vit_tiny and vit_base; {name} has no patches")
    if name.startswith("timm:"):
        try:  # transformers must be told the image size, convolutional networks do not take it
            return timm.create_model(name[5:], num_classes=num_classes, in_chans=in_channels, img_size=image_size)
        except TypeError:
            return timm.create_model(name[5:], num_classes=num_classes, in_chans=in_channels)
    return _NETS[name](num_classes, in_channels, image_size, patch_size)


__all__ = ["check_name", "create_model", "list_models"]
