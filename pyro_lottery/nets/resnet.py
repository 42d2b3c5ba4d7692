"""Residual networks for small images (He et al. 2016): basic blocks, a 3×3 stem with stride 1, no max pooling."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, which is a 1×1 convolution if the shape changes and the identity otherwise."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """A stem, one stage of basic blocks per width, and a linear classifier; each later stage halves the resolution."""

    def __init__(self, widths: tuple[int, ...], blocks: int, num_classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = len(widths)
        channels = widths[0]
        for stage, width in enumerate(widths):
            layers = []
            for block in range(blocks):
                layers.append(BasicBlock(channels, width, 2 if stage > 0 and block == 0 else 1))
                channels = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def resnet18(num_classes: int, in_channels: int) -> ResNet:
    """Build the ResNet-18 for small images: four stages of two blocks, widths 64 to 512, 11.2 M weights."""
    return ResNet((64, 128, 256, 512), 2, num_classes, in_channels)


def resnet20(num_classes: int, in_channels: int) -> ResNet:
    """Build the CIFAR ResNet with 6n+2 layers, n = 3: widths 16 to 64, 0.27 M weights."""
    return ResNet((16, 32, 64), 3, num_classes, in_channels)


def resnet110(num_classes: int, in_channels: int) -> ResNet:
    """Build the CIFAR ResNet with 6n+2 layers, n = 18: widths 16 to 64, 1.7 M weights."""
    return ResNet((16, 32, 64), 18, num_classes, in_channels)
