"""Vision transformers for small images, built by timm."""

from __future__ import annotations

from torch import nn


def vit(name: str, num_classes: int, in_channels: int, image_size: int, patch_size: int | None) -> nn.Module:
    """Build a timm ViT whose patches have sides of ``patch_size`` pixels, by default ``image_size // 8`` (64 patches).

    Its linear and convolutional layers start with PyTorch's Kaiming-uniform initialisation, as in the paper, instead of
    timm's truncated normal.
    """
    import timm  # takes a second, which other networks do not need

    net = timm.create_model(
        name, img_size=image_size, patch_size=patch_size or max(1, image_size // 8), in_chans=in_channels,
        num_classes=num_classes,
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    return net
