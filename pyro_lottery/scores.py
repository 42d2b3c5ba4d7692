"""Pruning scores: a score is any function of a Posterior that gives each site a tensor; the lowest are pruned (paper §5)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyro_lottery import seeds
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.types import Posterior, Sites
from pyro_lottery.untrusted import load_callable

Score = Callable[[Posterior], Sites]


def snr(posterior: Posterior) -> Sites:
    """Signal-to-noise ratio |μ|/σ; the paper's default."""
    scale = _scale(posterior, "snr")
    return {name: loc.abs() / scale[name] for name, loc in posterior.loc.items()}


def magnitude(posterior: Posterior) -> Sites:
    """|μ|, which is |w| in a deterministic network."""
    return {name: loc.abs() for name, loc in posterior.loc.items()}


def squared_sum(posterior: Posterior) -> Sites:
    """√(μ² + σ²)."""
    scale = _scale(posterior, "squared_sum")
    return {name: torch.hypot(loc, scale[name]) for name, loc in posterior.loc.items()}


def mean_over_variance(posterior: Posterior) -> Sites:
    """|μ|/(σ² + 1e-6), as in a public research fork that appears to hold the paper's code."""
    scale = _scale(posterior, "mean_over_variance")
    return {name: loc.abs() / (scale[name] ** 2 + 1e-6) for name, loc in posterior.loc.items()}


def squared_sum_log_scale(posterior: Posterior) -> Sites:
    """μ² + (log σ)², from the same fork."""
    scale = _scale(posterior, "squared_sum_log_scale")
    return {name: loc**2 + scale[name].log() ** 2 for name, loc in posterior.loc.items()}


def random(posterior: Posterior, seed: int = 0) -> Sites:
    """Uniform noise: the control that says what a score is worth."""
    generator = seeds.generator("cpu", seed, "random")
    return {name: torch.rand(loc.shape, generator=generator).to(loc) for name, loc in posterior.loc.items()}


_SCORES: dict[str, Score] = {
    f.__name__: f for f in (snr, magnitude, squared_sum, mean_over_variance, squared_sum_log_scale, random)
}


def by_name(name: str, seed: int = 0, level: int = 0) -> Score:
    """A score from its command-line name or import path; ``random`` draws anew at every level."""
    if name == "random":
        return lambda posterior: random(posterior, seeds.derive(seed, "score", level))
    if name in _SCORES:
        return _SCORES[name]
    if "." not in name:
        raise unknown("score", name, [*_SCORES, "package.module.function"])
    return load_callable(name, "--score")


def _scale(posterior: Posterior, name: str) -> Sites:
    if posterior.scale is None:
        raise UserError(f"score {name} needs scales, and a point guide has none; use magnitude")
    return posterior.scale
