"""A run folder as version 0.1.0 wrote it, stopped in level 2: rows with checksums in results.csv, and no manifests.

It was made by ``python -m pyro_lottery.imp`` with the options of its config.json, and stopped by SIGTERM.
"""

from torch import nn


class Network(nn.Sequential):
    """What the run trains: 8 × 8 digits, 138 parameters, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8, 10),
        )  # fmt: skip
