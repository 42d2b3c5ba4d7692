"""The VGG of the lottery-ticket literature: convolutions with BatchNorm, average pooling and one linear classifier.

After Simonyan & Zisserman (2015), whose networks have no BatchNorm and three linear layers.
"""

from __future__ import annotations

from torch import Tensor, nn


class VGG(nn.Module):
    """3×3 convolutions with the widths in ``plan``; ``"M"`` stands for 2×2 max pooling."""

    def __init__(self, plan: tuple[int | str, ...], num_classes: int, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for item in plan:
            if isinstance(item, int):
                layers += [
                    nn.Conv2d(channels, item, 3, padding=1, bias=False),
                    nn.BatchNorm2d(item),
                    nn.ReLU(inplace=True),
                ]
                channels = item
            else:
                # ceil_mode makes no difference for 32×32 images; with it, 8×8 images survive four poolings.
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def vgg11(num_classes: int, in_channels: int) -> VGG:
    """Build the VGG with eight convolutions, 9.2 M weights."""
    return VGG((64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512), num_classes, in_channels)


def vgg19(num_classes: int, in_channels: int) -> VGG:
    """Build the VGG with sixteen convolutions, 20 M weights."""
    plan: tuple[int | str, ...] = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4)
    return VGG(plan, num_classes, in_channels)
