"""Likelihoods of any kind: which targets suit one, and the mixture of those that draws of the weights give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_lottery import seeds
from pyro_lottery.errors import UserError
from pyro_lottery.trees import as_real

SAMPLES = 4000
"""From which an interval is taken where the likelihood has no distribution function; fewer for more than 33,000 numbers,
so that they take half a gigabyte, and 200 at least."""


def elementary(likelihood: Any) -> Any:
    """The distribution of one element of a target, inside ``.to_event()`` and ``.mask()``."""
    while isinstance(likelihood, dist.Independent | dist.MaskedDistribution):
        likelihood = likelihood.base_dist
    return likelihood


def checked_targets(y: Any, likelihood: Any, dtype: torch.dtype) -> Tensor:
    """Targets as ``likelihood`` takes them; ``UserError`` for those of another shape, which it would broadcast.

    Whole numbers become ``dtype``, or labels int64. Shapes and dtypes alone are looked at, so that a GPU is not waited for.
    """
    if not isinstance(y, Tensor) or y.is_complex():
        what = str(y.dtype) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise UserError(f"targets must be a tensor of real numbers, got {what}")
    wanted = tuple(likelihood.shape())
    if tuple(y.shape) != wanted:
        raise UserError(f"targets are {tuple(y.shape)}, but the likelihood is of {wanted}{_remedy(y, wanted)}")
    if isinstance(elementary(likelihood), dist.Categorical):  # which cuts 0.9 to 0
        if y.is_floating_point():
            raise UserError(f"labels must be integers from 0 to classes − 1, got {y.dtype}; give y.long()")
        return y.long()
    return y if y.is_floating_point() else y.to(dtype)


def _remedy(y: Tensor, wanted: tuple[int, ...]) -> str:
    """What would make targets of the shape that is wanted, if that is plain."""
    if (*y.shape, 1) == wanted:
        return f": give y[{':, ' * y.ndim}None]"
    if tuple(y.shape) == (*wanted, 1):
        return ": give y.squeeze(-1)"
    if y.ndim and len(y) != wanted[0]:
        return f": {len(y)} targets for {wanted[0]} examples"
    return ""


def mean_of(likelihood: Any, like: Tensor) -> Tensor:
    """E[y] [n, ...]; NaN, as ``like`` is, where the likelihood has none, or none that is known."""
    return _moment(likelihood, "mean", like)


_CIRCULAR = (dist.VonMises, dist.VonMises3D, dist.SineBivariateVonMises, dist.SineSkewed, dist.ProjectedNormal)
"""Whose mean is a direction, and whose variance is no square of angles."""


def _moment(likelihood: Any, name: str, like: Tensor) -> Tensor:
    if isinstance(elementary(likelihood), _CIRCULAR):
        return like.new_full(tuple(likelihood.shape()), math.nan)
    try:
        return getattr(likelihood, name)
    except NotImplementedError:
        return like.new_full(tuple(likelihood.shape()), math.nan)


@dataclass(frozen=True, eq=False)
class Mixture:
    """What draws of the weights say of real targets [n, ...]: p(y | x) ≈ (1/S) Σ_s p(y | x, w_s).

    Every measure is per element of a target, but :meth:`log_prob` and :meth:`samples`, which are of whole targets.
    """

    likelihoods: tuple[Any, ...]
    """One for each draw of the weights, of batch shape [n]."""
    like: Tensor
    """A tensor of the dtype and on the device that measures have."""

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.likelihoods)

    @cached_property
    def mean(self) -> Tensor:
        """E[y | x] [n, ...]; NaN where the likelihood has none."""
        return self._means.mean(0).to(self.like)

    @cached_property
    def aleatoric(self) -> Tensor:
        """Standard deviation of the noise [n, ...], √E_s Var[y | x, w_s]: what the data leave open whatever the weights."""
        variances = torch.stack([_moment(each, "variance", self.like).double() for each in self.likelihoods])
        return variances.mean(0).sqrt().to(self.like)

    @cached_property
    def epistemic(self) -> Tensor:
        """Standard deviation over the draws of their means [n, ...]: what the weights leave open; 0 of one draw."""
        return self._means.std(0, correction=0).to(self.like)

    @cached_property
    def total(self) -> Tensor:
        """Standard deviation of y [n, ...]: √(aleatoric² + epistemic²)."""
        return (self.aleatoric.double().square() + self.epistemic.double().square()).sqrt().to(self.like)

    @cached_property
    def _means(self) -> Tensor:
        return torch.stack([mean_of(each, self.like).double() for each in self.likelihoods])

    @torch.no_grad()
    def samples(self, k: int = 1) -> Tensor:
        """``k`` samples of all targets [k, n, ...] by torch's global generator; sample i is of draw i mod S."""
        if k < 1:
            raise UserError(f"the number of samples must be at least 1, got {k}")
        return torch.stack([self.likelihoods[i % self.num_samples].sample() for i in range(k)])

    @torch.no_grad()
    def log_prob(self, y: Any) -> Tensor:
        """log p(y | x) in nats [n], of the draws' mean density; −∞ for what the likelihood cannot give."""
        y = checked_targets(as_real(y).to(self.like.device), self.likelihoods[0], self.like.dtype)
        with pyro.validation_enabled(False):
            each = torch.stack([_log_prob(likelihood, y) for likelihood in self.likelihoods])
        return each.logsumexp(0) - math.log(self.num_samples)

    @torch.no_grad()
    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The central predictive interval, (lower, upper) [n, ...] each, outside of which lie (1 − level)/2 on either side.

        By bisection of the mixture's distribution function where the likelihood has one; otherwise from ``SAMPLES`` samples,
        always the same.
        """
        if not 0 < level < 1:
            raise UserError(f"the level of an interval must be between 0 and 1, got {level}")
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
        with seeds.stream(self.like.device, 0, "interval"):
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
    """Whether the elements' distribution function is known, on a range that is the same for all draws."""
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
    """The value [n, ...] below which ``probability`` of the mixture lies; NaN where that is."""
    to_support: Any = biject_to(elements[0].support)  # from the real line, on which the interval is halved

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
