"""The protocols of the paper's experiments: the extent of a study, and what the smaller ones leave out.

A protocol is a preset of ``python -m pyro_lottery.imp`` (pyro_lottery/runs/presets.py: images, epochs, levels) and the extent
of the study: which networks, how many seeds, which levels get controls, which learning rates are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pyro_lottery.errors import UserError
from pyro_lottery.runs.config import RESUMABLE, Config, preset
from pyro_lottery.tables import OPTIONS


@dataclass(frozen=True)
class Protocol:
    """The extent of a study."""

    archs: tuple[str, ...] = ("resnet20", "vgg11", "vit_tiny")
    seeds: int = 3
    derived_levels: tuple[int, ...] | None = None
    """Levels that get controls and transplants; None: all except the dense level."""
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """Learning rates of figure 7; the paper names none."""
    warmup_epochs: int = 10
    """Warm-up epochs of figure 7's second set of runs."""
    patch_size: int | None = None
    """Patch size of transformers in pixels; None: an eighth of the image."""
    claims: tuple[int, ...] = ()
    """The only claims that this protocol decides, before any other does; none: all that no such protocol has decided."""

    def options(self, arch: str) -> dict[str, Any]:
        """Options that only some networks take."""
        return {"patch_size": self.patch_size} if self.patch_size and arch.startswith("vit_") else {}


PROTOCOLS = {
    "paper": Protocol(),
    "fast": Protocol(derived_levels=(3, 6, 9)),
    "reduced": Protocol(archs=("resnet20",), seeds=3, derived_levels=(1, 3, 5), warmup_epochs=1),
    "minimal": Protocol(archs=("vgg11", "vit_tiny"), seeds=1, derived_levels=(1, 3, 5), warmup_epochs=1, patch_size=8),
    "evidence": Protocol(archs=("resnet20",), seeds=5, derived_levels=(2, 3), rates=(2e-4, 2e-3), warmup_epochs=1),
    "evidence_small": Protocol(
        archs=("vgg11", "vit_tiny"), seeds=5, derived_levels=(2, 3), rates=(1e-4, 1e-3), warmup_epochs=1, patch_size=8
    ),
    "costs": Protocol(derived_levels=(4,), patch_size=8, claims=(11,)),
    "smoke": Protocol(archs=("lenet",), seeds=1, derived_levels=(2,), rates=(1e-3, 1e-2), warmup_epochs=1),
}
LARGER = {"resnet20": "resnet110", "vgg11": "vgg19", "vit_tiny": "vit_base", "lenet": "resnet20"}
"""The larger network of each family (paper, appendix A). The smoke protocol's lenet has none, so resnet20 is used."""

FREE = RESUMABLE | {*OPTIONS, "patch_size", "dataset", "precision"} - {"train_samples"}
"""Options that may differ between the runs of one protocol: those that a study compares, the data and the machine."""


def protocol_of(config: Config) -> str:
    """The protocol by which ``config`` trains, or ``custom``.

    >>> protocol_of(preset("reduced", arch="vgg11", score="magnitude")), protocol_of(preset("reduced", epochs=3))
    ('reduced', 'custom')
    """
    fixed = [f.name for f in fields(Config) if f.name not in FREE - {"patch_size"}]
    for name, extent in PROTOCOLS.items():
        usual = preset(name, arch=config.arch, **extent.options(config.arch))
        if all(getattr(config, option) == getattr(usual, option) for option in fixed):
            return name
    return "custom"


def base_rate(name: str) -> float:
    """The learning rate of a protocol outside figure 7.

    >>> base_rate("paper")
    0.001
    """
    return preset(name).lr


def describe(config: Config) -> str:
    """The protocol in words, for a figure's title.

    >>> describe(preset("reduced"))
    'reduced protocol: 2,000 training images, 10 epochs a level, batch 50, 60 % pruned a level, weight samples: 1'
    >>> describe(preset("fast"))
    'fast protocol: all training images, 160 epochs a level, batch 128, 40 % pruned a level, weight samples: 1'
    """
    images = f"{config.train_size:,} training images" if config.train_size else "all training images"
    return (
        f"{protocol_of(config)} protocol: {images}, {config.epochs} epochs a level, batch {config.batch_size}, "
        f"{config.pruned}, weight samples: {config.train_samples}"
        + (f", {config.patch_size}-pixel patches" if config.patch_size else "")
    )


def extent(name: str) -> Protocol:
    """The protocol called ``name``; raises ``UserError`` if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: choose among {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
