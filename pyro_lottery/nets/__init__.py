"""The networks, as plain ``nn.Module``s that do not depend on Pyro."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.nets import lenet, resnet, vgg, vit
from pyro_lottery.nets.by_path import create, is_own
from pyro_lottery.untrusted import load_callable

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
    """Return the names that :func:`create_model` accepts, besides ``timm:NAME`` and ``package.module:function``.

    >>> "resnet18" in list_models()
    True
    """
    return sorted(_NETS)


def check_name(name: str) -> None:
    """Raise :class:`UserError` unless ``name`` is a known network or the import path of a function."""
    if is_own(name):
        load_callable(name, "--arch")
    elif name.startswith("timm:"):
        import timm  # takes a second, which other networks do not need

        if not timm.is_model(name[5:]):
            raise unknown("--arch", name, [f"timm:{model}" for model in timm.list_models()])
    elif name not in _NETS:
        if "." in name and is_own(path := ":".join(name.rsplit(".", 1))):
            raise UserError(f"unknown --arch {name!r}: import paths are written package.module:function; use {path}")
        raise unknown("--arch", name, [*list_models(), "timm:NAME", "package.module:function"])


def create_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    patch_size: int | None = None,
) -> nn.Module:
    """Build a network by name for inputs ``[batch, in_channels, height, width]`` (paper §2).

    ``image_size`` is the side of square images in pixels, or (height, width). ``patch_size`` is an option of ``vit_tiny``
    and ``vit_base``. ``timm:NAME`` builds any timm classifier with timm's initialisation; the library's own networks start
    with PyTorch's Kaiming-uniform initialisation. ``package.module:function`` calls that function with those of
    ``num_classes``, ``in_channels`` and ``image_size`` that it accepts.

    Raises ``UserError`` for an unknown name, for options that the network cannot use, and for a function that fails or does
    not return an ``nn.Module``.

    >>> sum(p.numel() for p in create_model("resnet20").parameters())
    272474
    """
    check_name(name)
    if patch_size is not None and not name.startswith("vit_"):
        raise UserError(f"--patch-size is for --arch vit_tiny and vit_base; --arch {name} has no patches")
    if isinstance(image_size, tuple) and image_size[0] == image_size[1]:
        image_size = image_size[0]
    if is_own(name):
        return create(name, {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size})
    if isinstance(image_size, tuple) and name.startswith(("vit_", "lenet")):
        height, width = image_size
        raise UserError(f"--arch {name} takes square images, not {height}×{width}; try a resnet or vgg")
    if name.startswith("timm:"):
        import timm

        try:  # transformers need the image size, convolutional networks do not accept it
            return timm.create_model(name[5:], num_classes=num_classes, in_chans=in_channels, img_size=image_size)
        except TypeError:
            return timm.create_model(name[5:], num_classes=num_classes, in_chans=in_channels)
    return _NETS[name](num_classes, in_channels, image_size, patch_size)


__all__ = ["check_name", "create_model", "is_own", "list_models"]
