"""Scores by loc and scale alone."""

from __future__ import annotations

import torch

from pyro_lottery import seeds
from pyro_lottery.errors import UserError
from pyro_lottery.types import Posterior, Sites


def snr(posterior: Posterior) -> Sites:
    """The signal-to-noise ratio |μ|/σ, the paper's default; each tensor has the shape of its site.

    (μ/σ)²/2, what optimal brain damage (LeCun et al. 1990) makes of a Gaussian posterior, ranks weights alike.
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


def log_alpha(posterior: Posterior) -> Sites:
    """log(μ²/σ²) = −log α of variational dropout (Molchanov et al. 2017), which prunes log α > 3; each tensor has the shape of its site.

    Raises ``UserError`` if the posterior has no scales.
    """
    scale = _scale(posterior, "log_alpha")
    return {name: 2 * (loc.abs().log() - scale[name].log()) for name, loc in posterior.loc.items()}


def _scale(posterior: Posterior, name: str) -> Sites:
    if posterior.scale is None:
        raise UserError(f"--score {name} needs scales, but a point guide has none; use --score magnitude")
    return posterior.scale
