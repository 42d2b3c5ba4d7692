"""The values that pass between stages: frozen, and without behaviour but to be written to a file and read from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lottery import files
from pyro_lottery.errors import Damaged

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

    def save(self, path: str | Path, net: Sites, mask: Mask | None = None) -> None:
        """Write loc/, scale/, the ``net``/ that belongs to it and perhaps a mask/ as safetensors."""
        groups = {"loc": self.loc, "scale": self.scale or {}, "net": net, "guide": self.extra}
        tensors = {f"{group}/{name}": t for group, sites in groups.items() for name, t in sites.items()}
        tensors |= {f"mask/{name}": m.bool().to(torch.uint8) for name, m in (mask or {}).items()}
        # safetensors sorts its tensors; the network's order, in which ties are settled, is kept here.
        info: dict[str, Any] = {"sites": list(self.loc), "prunable": list(self.prunable)}
        info |= {"draws": self.draws} if self.draws else {}
        files.save_tensors(Path(path), tensors, info | infinite_info(tensors))

    @classmethod
    def load(cls, path: str | Path) -> tuple[Posterior, Sites]:
        """Read what :meth:`save` wrote: the posterior, and the ``net`` that belongs to it."""
        posterior, net, _ = _load(Path(path))
        return posterior, net


@dataclass(frozen=True, eq=False)
class Ticket:
    """What a level starts from: a mask, the initial posterior, and the part of the network that is not random."""

    mask: Mask
    start: Posterior
    net: Sites

    def save(self, path: str | Path) -> None:
        """Write the ticket to a safetensors file of its own: mask/ as uint8 0/1, loc/, scale/, net/."""
        self.start.save(path, self.net, self.mask)

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket from its file; ``Damaged`` if it is not whole, or no ticket."""
        start, net, mask = _load(Path(path))
        if set(mask) != set(start.prunable):
            raise Damaged(f"{path} is no ticket: its masks are not of its prunable sites")
        return cls({name: mask[name].bool() for name in start.prunable}, start, net)


def _load(path: Path) -> tuple[Posterior, Sites, Sites]:
    tensors, info = files.load_tensors(path)
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in ("mask", "loc", "scale", "net", "guide")}
    try:
        sites, prunable = info["sites"], tuple(info["prunable"])
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        loc = {name: groups["loc"][name] for name in sites}
        scale = {name: groups["scale"][name] for name in loc} if groups["scale"] else None
        posterior = Posterior(loc, scale, prunable, groups["guide"], info.get("draws", 0))
        _check(path, posterior, groups, info)
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path} holds no posterior: {error} is missing or unknown") from error
    return posterior, groups["net"], groups["mask"]


def infinite_info(tensors: Sites) -> dict[str, Any]:
    """What a file's JSON says of buffers (``net/NAME``) that hold infinite numbers, as attention masks do: their names."""
    names = [n for n, t in tensors.items() if n.startswith("net/") and bool(t.isinf().any())]
    return {"infinite": names} if names else {}


def all_finite(name: str, value: Tensor, info: Mapping[str, Any]) -> bool:
    """Whether a tensor of a file holds finite numbers, or is one of the buffers that :func:`infinite_info` names."""
    names = info.get("infinite")
    if name.startswith("net/") and isinstance(names, list) and name in names:
        return not bool(value.isnan().any())
    return bool(value.isfinite().all())


def _check(path: Path, posterior: Posterior, groups: Mapping[str, Sites], info: Mapping[str, Any]) -> None:
    """Raise ``Damaged`` unless values are what they are called: whoever wrote the file could write a checksum too."""

    def must(right: Any, name: str, what: str) -> None:
        if not right:
            raise Damaged(f"{path}: {name} {what}")

    loc, scale, mask = groups["loc"], groups["scale"], groups["mask"]
    must(loc.keys() == posterior.loc.keys() and len(loc) > 0, "loc/", "is not of its sites")
    must(not scale or scale.keys() == loc.keys(), "scale/", "is not of its sites")
    prunable = set(posterior.prunable)
    must(prunable <= loc.keys() and len(prunable) == len(posterior.prunable), "prunable", "is not some of its sites")
    must(type(posterior.draws) is int and posterior.draws >= 0, "draws", "is not a count")
    for group, sites in groups.items():
        for name, value in sites.items():
            key = f"{group}/{name}"
            if group in ("loc", "scale"):
                must(value.is_floating_point() and value.shape == loc[name].shape, key, "does not fit its loc")
            if group == "mask":
                must(name in prunable, key, "is of no prunable site")
                must(value.dtype == torch.uint8 and value.shape == loc[name].shape, key, "is no mask of its loc")
                must(bool((value <= 1).all()), key, "holds other values than 0 and 1")
            if group == "scale":  # 0 is a pruned weight's
                must(bool((value >= 0).all()), key, "holds negative scales")
                must(name not in mask or bool((value[mask[name] == 1] > 0).all()), key, "of survivors is not positive")
            must(all_finite(key, value, info), key, "holds values that are not finite")


@dataclass(frozen=True)
class LevelResult:
    """One row of ``results.csv``; a value that was not measured is None, as are accuracies of real targets."""

    level: int
    density: float
    remaining: int
    total: int
    test_accuracy: float | None
    max_test_accuracy: float | None
    val_accuracy: float | None
    nll: float
    mace: float | None
    ece: float | None
    brier: float | None
    train_seconds: float
    step_ms: float
    selected_test_accuracy: float | None = None
    """Test accuracy at the epoch with the best validation accuracy."""
    rmse: float | None = None
    val_rmse: float | None = None
    """Least over epochs."""
    coverage_50: float | None = None
    coverage_80: float | None = None
    coverage_95: float | None = None
    """Share of test targets within the central predictive interval of that probability."""

    @property
    def is_regression(self) -> bool:
        """Whether targets are real: then accuracies and calibration errors are None, and for classes ``rmse`` and coverages."""
        return self.test_accuracy is None
