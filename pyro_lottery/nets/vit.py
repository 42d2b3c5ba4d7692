"""Vision transformers for small images, built by timm."""

from __future__ import annotations

import timm
from torch import nn


def vit(name: str, num_classes: int, in_channels: int, image_size: int, patch_size: int | None) -> nn.Module:
    """A timm ViT with ``image_size // 8`` pixels a patch (4 at 32×32: 64 tokens) unless told otherwise.

    Its linear and convolutional layers start at PyTorch's Kaiming-uniform instead of timm's truncated normal,
    so that every network of this package starts as the paper says.
    """
    net = timm.create_model(
        name,
        img_size=image_size,
        patch_size=patch_size or max(1, image_size // 8),
        in_chans=in_channels,
        num_classes=num_classes,
    )
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    return net
