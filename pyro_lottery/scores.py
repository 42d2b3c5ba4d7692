"""Pruning scores (paper §5): functions from a ``Posterior`` to one tensor per site; the lowest-scoring weights are pruned.

Each tensor has the shape of its site. A score of your own is any such function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyro_lottery import seeds
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.types import Posterior, Sites
from pyro_lottery.untrusted import load_callable

Score = Callable[[Posterior], Sites]


def snr(posterior: Posterior) -> Sites:
    """The signal-to-noise ratio |μ|/σ, the paper's default; each tensor has the shape of its site.

    Raises ``UserError`` if the posterior has no scales.
    """
    scale = _scale(posterior, "snr")
    return {name: loc.abs() / scale[name] for name, loc in posterior.loc.items()}


def magnitude(posterior: Posterior) -> Sites:
    """|μ|, which is |w| in a deterministic network; each tensor has the shape of its site."""
    return {name: loc.abs() for name, loc in posterior.loc.items()}


def squared_sum(posterior: Posterior) -> Sites:
    """√(μ² + σ²); each tensor has the shape of its site.

    Raises ``UserError`` if the posterior has no scales.
    """
    scale = _scale(posterior, "squared_sum")
    return {name: torch.hypot(loc, scale[name]) for name, loc in posterior.loc.items()}


def mean_over_variance(posterior: Posterior) -> Sites:
    """|μ|/(σ² + 1e-6), as in a public fork that appears to contain the paper's code; each tensor has the shape of its site.

    Raises ``UserError`` if the posterior has no scales.
    """
    scale = _scale(posterior, "mean_over_variance")
    return {name: loc.abs() / (scale[name] ** 2 + 1e-6) for name, loc in posterior.loc.items()}


def squared_sum_log_scale(posterior: Posterior) -> Sites:
    """μ² + (log σ)², from the same fork as ``mean_over_variance``; each tensor has the shape of its site.

    Raises ``UserError`` if the posterior has no scales.
    """
    scale = _scale(posterior, "squared_sum_log_scale")
    return {name: loc**2 + scale[name].log() ** 2 for name, loc in posterior.loc.items()}


def random(posterior: Posterior, seed: int = 0) -> Sites:
    """Uniform noise from ``seed``, the baseline for all other scores; each tensor has the shape of its site."""
    generator = seeds.generator("cpu", seed, "random")
    return {name: torch.rand(loc.shape, generator=generator).to(loc) for name, loc in posterior.loc.items()}


_SCORES: dict[str, Score] = {
    f.__name__: f for f in (snr, magnitude, squared_sum, mean_over_variance, squared_sum_log_scale, random)
}


def by_name(name: str, seed: int = 0, level: int = 0) -> Score:
    """A score from its command-line name or import path; ``random`` uses new noise at every level.

    Raises ``UserError`` if the name is unknown, or if the import fails.
    """
    if name == "random":
        return lambda posterior: random(posterior, seeds.derive(seed, "score", level))
    if name in _SCORES:
        return _SCORES[name]
    if "." not in name:
        raise unknown("--score", name, [*_SCORES, "package.module.function"])
    return load_callable(name, "--score")


def _scale(posterior: Posterior, name: str) -> Sites:
    if posterior.scale is None:
        raise UserError(f"--score {name} needs scales, but a point guide has none; use --score magnitude")
    return posterior.scale
