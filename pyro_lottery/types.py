"""The values that pass between stages: frozen, without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

Sites = Mapping[str, Tensor]
"""One tensor per site, in the network's order; a site is named as in the network: ``layer1.0.conv1.weight``."""

Mask = Mapping[str, Tensor]
"""One bool tensor per prunable site: True survives."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """Marginal loc and scale of every site; ``scale`` is None for a point guide.

    ``extra`` holds the raw parameters of guides that loc and scale do not determine (a covariance, say).
    """

    loc: Sites
    scale: Sites | None
    prunable: tuple[str, ...]
    extra: Sites = field(default_factory=dict)
    draws: int = 0
    """Draws that loc and scale are estimated from, with standard errors scale/√draws and scale/√(2·draws); 0: exact."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """What a level starts from: a mask, the initial posterior, and the part of the network that is not random."""

    mask: Mask
    start: Posterior
    net: Sites


@dataclass(frozen=True)
class LevelResult:
    """One row of ``results.csv``; a value that was not measured is None."""

    level: int
    density: float
    remaining: int
    total: int
    test_accuracy: float
    max_test_accuracy: float
    val_accuracy: float | None
    nll: float
    mace: float
    ece: float
    brier: float
    train_seconds: float
    step_ms: float
    selected_test_accuracy: float | None = None
    """Test accuracy at the epoch with the best validation accuracy."""
