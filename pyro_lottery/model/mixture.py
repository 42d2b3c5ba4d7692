"""The posterior predictive of real targets: the mixture of the likelihoods of several posterior samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_lottery import seeds
from pyro_lottery.distributions import elementary
from pyro_lottery.errors import UserError, check_counts
from pyro_lottery.model.likelihoods import checked_targets, moment
from pyro_lottery.trees import as_real

SAMPLES = 4000
"""Number of samples from which an interval is computed if the likelihood has no distribution function. There are fewer for
more than 33,000 target elements, to stay within half a gigabyte, but at least 200."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """The posterior predictive of real targets [n, ...]: p(y | x) ≈ (1/S) Σ_s p(y | x, w_s) over S posterior samples.

    ``mean``, ``aleatoric``, ``epistemic``, ``total`` and ``interval`` are per element of a target; ``log_prob`` and
    ``samples`` treat each target as a whole.
    """

    likelihoods: tuple[Any, ...]
    """One likelihood per posterior sample, with batch shape [n]."""
    like: Tensor
    """A tensor with the dtype and device of the results."""

    @property
    def num_samples(self) -> int:
        """S, the number of posterior samples."""
        return len(self.likelihoods)

    @cached_property
    def mean(self) -> Tensor:
        """E[y | x] [n, ...]; NaN if the likelihood has no mean."""
        return self._means.mean(0).to(self.like)

    @cached_property
    def aleatoric(self) -> Tensor:
        """Standard deviation of the noise [n, ...], √E_s Var[y | x, w_s]: uncertainty that remains for known weights."""
        variances = torch.stack([moment(each, "variance", self.like).double() for each in self.likelihoods])
        return variances.mean(0).sqrt().to(self.like)

    @cached_property
    def epistemic(self) -> Tensor:
        """Standard deviation of E[y | x, w_s] over posterior samples [n, ...]: uncertainty about the weights; 0 for one sample."""
        return self._means.std(0, correction=0).to(self.like)

    @cached_property
    def total(self) -> Tensor:
        """Standard deviation of y [n, ...]: √(aleatoric² + epistemic²)."""
        return (self.aleatoric.double().square() + self.epistemic.double().square()).sqrt().to(self.like)

    @cached_property
    def _means(self) -> Tensor:
        return torch.stack([moment(each, "mean", self.like).double() for each in self.likelihoods])

    @torch.no_grad()
    def samples(self, k: int = 1) -> Tensor:
        """``k`` samples of all targets [k, n, ...]; sample i uses posterior sample i mod S and torch's global generator.

        Raises ``UserError`` if ``k`` is less than 1.
        """
        check_counts(1, **{"the number of samples": k})
        return torch.stack([self.likelihoods[i % self.num_samples].sample() for i in range(k)])

    @torch.no_grad()
    def log_prob(self, y: Any) -> Tensor:
        """log p(y | x) [n] in nats, the log of the mean density; −∞ outside the likelihood's support.

        Raises ``UserError`` if the shape of ``y`` is not [n, ...].
        """
        y = checked_targets(as_real(y).to(self.like.device), self.likelihoods[0], self.like.dtype)
        with pyro.validation_enabled(False):
            each = torch.stack([_log_prob(likelihood, y) for likelihood in self.likelihoods])
        return each.logsumexp(0) - math.log(self.num_samples)

    @torch.no_grad()
    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The bounds, (lower, upper), each [n, ...], of the central predictive interval with probability ``level``.

        Computed by bisection of the mixture's distribution function, or from ``SAMPLES`` samples with a fixed seed if the
        likelihood has none. Raises ``UserError`` if ``level`` is not between 0 and 1.
        """
        if not isinstance(level, Real) or not 0 < level < 1:
            raise UserError(f"the level of an interval must be between 0 and 1, got {level!r}")
        probabilities = ((1 - level) / 2, (1 + level) / 2)
        with pyro.validation_enabled(False):
            elements = [elementary(likelihood) for likelihood in self.likelihoods]
            if _has_cdf(elements, self.like):
                lower, upper = (_quantile(elements, p, self.like) for p in probabilities)
            else:
                lower, upper = self._sampled_quantiles(probabilities)
        return lower.to(self.like), upper.to(self.like)

    def _sampled_quantiles(self, probabilities: tuple[float, float]) -> list[Tensor]:
        count = max(200, min(SAMPLES, 2**27 // max(1, self._means[0].numel())))
        with seeds.rng(self.like.device, 0, "interval"):
            ordered = self.samples(count).sort(0).values
        return [ordered[math.ceil(p * count) - 1] for p in probabilities]


def _log_prob(likelihood: Any, y: Tensor) -> Tensor:
    found = likelihood.log_prob(y)
    try:
        possible = likelihood.support.check(y)
    except NotImplementedError:
        return found
    missing = y.isnan().reshape(len(y), -1).any(1)
    return torch.where(possible | missing, found, -math.inf)


def _has_cdf(elements: list[Any], like: Tensor) -> bool:
    """Whether the elements have a distribution function whose support is the same for all posterior samples."""
    support = elements[0].support
    bounds = [getattr(support, name, 0.0) for name in ("lower_bound", "upper_bound")]
    if elements[0].event_shape or support.is_discrete or not all(isinstance(b, int | float) for b in bounds):
        return False
    try:
        elements[0].cdf(biject_to(support)(torch.zeros(elements[0].batch_shape, device=like.device)))
    except NotImplementedError:
        return False
    return True


def _quantile(elements: list[Any], probability: float, like: Tensor) -> Tensor:
    """The quantile [n, ...] of the mixture at ``probability``; NaN where the distribution function is NaN."""
    to_support: Any = biject_to(elements[0].support)  # maps the real line, on which the bisection works, to the support

    def cdf(u: Tensor) -> Tensor:
        return torch.stack([each.cdf(to_support(u)) for each in elements]).mean(0)

    upper = torch.ones(elements[0].batch_shape, dtype=torch.double, device=like.device)
    lower, missing = -upper, cdf(upper).isnan()
    for _ in range(1000):
        short, far = cdf(upper) < probability, cdf(lower) >= probability
        if not bool((short | far).any()):
            break
        upper, lower = torch.where(short, 2 * upper, upper), torch.where(far, 2 * lower, lower)
    for _ in range(100):
        middle = (lower + upper) / 2
        if bool(((middle == lower) | (middle == upper)).all()):
            break
        low = cdf(middle) < probability
        lower, upper = torch.where(low, middle, lower), torch.where(low, upper, middle)
    return torch.where(missing, torch.nan, to_support((lower + upper) / 2))
