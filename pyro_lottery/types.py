"""The values that pass between stages: frozen data classes that can be saved to a file and loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lottery import files, packed, untrusted
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.names import GROUPS, grouped, joined

Sites = Mapping[str, Tensor]
"""One tensor per site, in the network's order. Site names are the network's: ``layer1.0.conv1.weight``."""

Mask = Mapping[str, Tensor]
"""One bool tensor per prunable site; True marks a weight that is kept."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """Marginal loc and scale of every site; ``scale`` is None for a point guide.

    ``extra`` holds the raw parameters of guides that loc and scale do not determine, such as a covariance.
    """

    loc: Sites
    scale: Sites | None
    prunable: tuple[str, ...]
    extra: Sites = field(default_factory=dict)
    draws: int = 0
    """Number of draws from which loc and scale are estimated, or 0 if they are exact.

    The standard errors of the estimates are scale/√draws and scale/√(2·draws)."""

    def save(self, path: str | Path, net: Sites, mask: Mask | None = None) -> None:
        """Write loc/, scale/, net/ (from ``net``) and, if ``mask`` is given, mask/ to a safetensors file."""
        groups = {"loc": self.loc, "scale": self.scale or {}, "net": net, "guide": self.extra}
        bits = {name: m.bool().to(torch.uint8) for name, m in (mask or {}).items()}
        tensors = joined(groups | {"mask": bits})
        # safetensors sorts tensors by name. The network's order, which decides between equal scores, is stored separately.
        info: dict[str, Any] = {"sites": list(self.loc), "prunable": list(self.prunable)}
        info |= {"draws": self.draws} if self.draws else {}
        files.save_tensors(Path(path), tensors, info | infinite_info(tensors))

    @classmethod
    def load(cls, path: str | Path) -> tuple[Posterior, Sites]:
        """Read a file of :meth:`save` and return the posterior and ``net``. Raises ``Damaged`` if the file is not valid."""
        posterior, net, _ = _load(Path(path))
        return posterior, net

    @classmethod
    def load_with_mask(cls, path: str | Path) -> tuple[Posterior, Sites, Mask | None]:
        """Read a file as :meth:`load` does, and the mask if the file has one."""
        posterior, net, mask = _load(Path(path))
        if mask and set(mask) != set(posterior.prunable):
            raise Damaged(f"{path}: its masks do not match its prunable sites")
        return posterior, net, {name: mask[name].bool() for name in posterior.prunable} if mask else None


@dataclass(frozen=True, eq=False)
class Ticket:
    """The start of a level: a mask, the initial posterior, and ``net``, the part of the network that is not random."""

    mask: Mask
    start: Posterior
    net: Sites

    def save(self, path: str | Path) -> None:
        """Write the ticket to a safetensors file with mask/ (uint8, 0 or 1), loc/, scale/ and net/."""
        self.start.save(path, self.net, self.mask)

    def pack(self, path: str | Path, dtype: str = "fp32", info: Mapping[str, Any] | None = None) -> None:
        """Write the ticket to a small safetensors file: a bit per prunable weight, and the surviving values in ``dtype``.

        ``dtype`` is a key of ``pyro_lottery.packed.DTYPES``; ``info`` holds facts about the network, as JSON. Raises
        ``UserError`` for a guide that loc and scale do not determine, such as a joint one.
        """
        if self.start.extra:
            raise UserError("a guide that loc and scale do not determine has no small file; use a mean-field guide")
        groups = {"mask": self.mask, "loc": self.start.loc, "scale": self.start.scale or {}, "net": self.net}
        tensors, facts = packed.pack(groups, dtype)
        facts |= {"sites": list(self.start.loc), "prunable": list(self.start.prunable)}
        files.save_tensors(Path(path), tensors, {**(info or {}), **facts} | infinite_info(tensors))

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket from a file of :meth:`save` or :meth:`pack`. Raises ``Damaged`` if the file is not a valid ticket."""
        start, net, mask = _load(Path(path))
        if set(mask) != set(start.prunable):
            raise Damaged(f"{path} is not a ticket: its masks do not match its prunable sites")
        return cls({name: mask[name].bool() for name in start.prunable}, start, net)


def ticket_checksum(ticket: Ticket) -> int:
    """Return a checksum of all values of ``ticket``: equal tickets have equal ones, on whatever device."""
    return posterior_checksum(ticket.start, ticket.net, {name: mask.bool() for name, mask in ticket.mask.items()})


def posterior_checksum(posterior: Posterior, *more: Sites) -> int:
    """Return a checksum of loc and scale of ``posterior``, and of ``more`` sites."""
    groups = dict(enumerate((posterior.loc, posterior.scale or {}, *more)))
    return files.checksum({name: value.cpu() for name, value in joined(groups).items()})


def _load(path: Path) -> tuple[Posterior, Sites, Sites]:
    tensors, info = untrusted.load_tensors(path)
    try:
        sites, prunable = info["sites"], tuple(info["prunable"])
        groups = packed.unpack(tensors, info) if packed.KEY in info else grouped(tensors)
        if others := groups.keys() - set(GROUPS):
            raise KeyError(min(others))
        loc = {name: groups["loc"][name] for name in sites}
        scale = {name: groups["scale"][name] for name in loc} if groups["scale"] else None
        posterior = Posterior(loc, scale, prunable, groups["guide"], info.get("draws", 0))
        _check(path, posterior, groups, info)
    except KeyError as error:
        raise Damaged(f"{path} does not hold a posterior: {error} is missing or unknown") from error
    except Damaged:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise Damaged(f"{path} does not hold a posterior: its metadata is not valid ({one_line(error)})") from error
    return posterior, groups["net"], groups["mask"]


def infinite_info(tensors: Sites) -> dict[str, Any]:
    """Return the ``info`` entry that lists buffers (``net/NAME``) with infinite numbers, such as attention masks."""
    names = [n for n, t in tensors.items() if n.startswith("net/") and bool(t.isinf().any())]
    return {"infinite": names} if names else {}


def all_finite(name: str, value: Tensor, info: Mapping[str, Any]) -> bool:
    """Return whether a tensor of a file holds only finite numbers; buffers listed by :func:`infinite_info` may be infinite."""
    names = info.get("infinite")
    if name.startswith("net/") and isinstance(names, list) and name in names:
        return not bool(value.isnan().any())
    return value.numel() == 0 or all(bool(end.isfinite()) for end in value.aminmax())  # one pass; NaN is passed on


def _check(path: Path, posterior: Posterior, groups: Mapping[str, Sites], info: Mapping[str, Any]) -> None:
    """Raise ``Damaged`` unless the tensors are a valid posterior; a correct checksum does not prove that."""

    def must(right: Any, name: str, what: str) -> None:
        if not right:
            raise Damaged(f"{path}: {name} {what}")

    loc, scale, mask = groups["loc"], groups["scale"], groups["mask"]
    must(loc.keys() == posterior.loc.keys() and len(loc) > 0, "loc/", "does not match the list of sites")
    must(not scale or scale.keys() == loc.keys(), "scale/", "does not match the list of sites")
    prunable = set(posterior.prunable)
    must(
        prunable <= loc.keys() and len(prunable) == len(posterior.prunable), "prunable", "is not a subset of the sites"
    )
    must(type(posterior.draws) is int and posterior.draws >= 0, "draws", "is not a count")
    for group, sites in groups.items():
        for name, value in sites.items():
            key = f"{group}/{name}"
            if group in ("loc", "scale"):
                must(value.is_floating_point() and value.shape == loc[name].shape, key, "does not fit its loc")
            if group == "mask":
                must(name in prunable, key, "does not belong to a prunable site")
                must(value.dtype == torch.uint8 and value.shape == loc[name].shape, key, "is not a mask for its loc")
                must(value.numel() == 0 or value.amax() <= 1, key, "holds values other than 0 and 1")
            if group == "scale" and value.numel():  # the scale of a pruned weight may be 0
                must(value.amin() >= 0, key, "holds negative scales")
                kept = value.masked_fill(mask[name] == 0, 1) if name in mask else value.new_ones(1)
                must(kept.amin() > 0, key, "is not positive at kept weights")
            must(all_finite(key, value, info), key, "holds values that are not finite")


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """One row of ``results.csv``. Values that were not measured are None, such as accuracies for real targets."""

    level: int
    density: float
    remaining: int
    total: int
    test_accuracy: float | None = None
    max_test_accuracy: float | None = None
    val_accuracy: float | None = None
    nll: float
    mace: float | None = None
    ece: float | None = None
    brier: float | None = None
    train_seconds: float
    step_ms: float
    selected_test_accuracy: float | None = None
    """Test accuracy at the epoch with the best validation accuracy."""
    rmse: float | None = None
    """None for classes, and for a likelihood without a mean."""
    val_rmse: float | None = None
    """Smallest validation error over the epochs."""
    coverage_50: float | None = None
    coverage_80: float | None = None
    coverage_95: float | None = None
    """Fraction of test targets within the central predictive interval of 95 % probability; likewise for 80 % and 50 %."""
    predict_ms: float | None = None
    """Milliseconds for each test example, from the posterior samples of a level's end."""
    flops: int | None = None
    """Floating-point operations of one example's forward pass with the weights that are not 0
    (:class:`pyro_lottery.handlers.count_flops`)."""

    @property
    def is_regression(self) -> bool:
        """Whether targets are real values. If so, accuracies and calibration errors are None; otherwise ``rmse`` and
        coverages are None."""
        return self.test_accuracy is None
