"""Distributions of weights with masks, and the shared draw of a mean-field guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import kl_divergence, register_kl

from pyro_lottery import kernels
from pyro_lottery.kernels import Layout
from pyro_lottery.kernels.layout import flatten


class Pruned(dist.MaskedDistribution):
    """A distribution of weights in which pruned weights are the constant 0, with log-probability 0 and KL 0."""

    _mask: Any  # a Tensor, which Pyro types as bool

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.where(self._mask, self.base_dist.sample(sample_shape), 0.0)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return torch.where(self._mask, self.base_dist.rsample(sample_shape), 0.0)

    @property
    def mean(self) -> Tensor:
        return torch.where(self._mask, self.base_dist.mean, 0.0)

    @property
    def variance(self) -> Tensor:
        return torch.where(self._mask, self.base_dist.variance, 0.0)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return _ZeroWherePruned(self._mask, self.base_dist.support)


class _ZeroWherePruned(constraints.Constraint):
    """The constraint ``base_constraint`` where ``mask`` keeps a weight, and exactly 0 elsewhere."""

    def __init__(self, mask: Tensor, base_constraint: Any):
        self.mask, self.base_constraint = mask, base_constraint
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return torch.where(self.mask, self.base_constraint.check(value), value == 0)


class _PruneTransform(torch.distributions.Transform):
    """Map unconstrained numbers to weights: kept ones by ``to_kept``, pruned ones to 0.

    A sampler of unconstrained numbers needs a density for each of them. The numbers of pruned weights have a standard normal
    density (up to a constant), so that a Markov chain does not drift in them; they never change a weight.
    """

    bijective = True  # sufficient for Pyro: weights map to numbers and back without change
    domain = constraints.real

    def __init__(self, mask: Tensor, to_kept: Any):
        super().__init__()
        self.mask, self.to_kept = mask, to_kept
        self.codomain = _ZeroWherePruned(mask, to_kept.codomain)

    def _call(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.to_kept(x), 0.0)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.where(
            self.mask, self.to_kept.inv(torch.where(self.mask, y, self.to_kept(torch.zeros_like(y)))), 0.0
        )

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        kept = torch.where(self.mask, y, self.to_kept(torch.zeros_like(y)))
        return torch.where(self.mask, self.to_kept.log_abs_det_jacobian(x, kept), -0.5 * x.square())


for _registry in (torch.distributions.biject_to, torch.distributions.transform_to):
    _registry.register(
        _ZeroWherePruned,
        lambda constraint, registry=_registry: _PruneTransform(constraint.mask, registry(constraint.base_constraint)),
    )


class PointMass(dist.Delta):
    """A Delta distribution whose guide has already set pruned weights to 0."""

    knows_masks = True


class Draw:
    """One evaluation of a mean-field Normal over all sites, given flat vectors ``loc`` and ``log_scale``.

    Samples of all sites, or their means and variances, are computed together on first use. The closed-form KL comes from the
    same autograd node, so the backward pass writes each gradient once.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor, layout: Layout):
        self.loc, self.log_scale, self.layout = loc, log_scale, layout
        self._priors = _Priors()

    @cached_property
    def _sampled(self) -> tuple[Tensor, ...]:
        return _Samples.apply(self.loc, self.log_scale, self.layout, self._priors)  # type: ignore[no-untyped-call]

    @cached_property
    def _moments(self) -> tuple[Tensor, ...]:
        return _Moments.apply(self.loc, self.log_scale, self.layout, self._priors)  # type: ignore[no-untyped-call]

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """One weight sample of every site."""
        return self._sampled[1:]

    @property
    def means(self) -> tuple[Tensor, ...]:
        """The mean of every site, 0 where pruned."""
        return self._moments[1 : 1 + len(self.layout.shapes)]

    @property
    def variances(self) -> tuple[Tensor, ...]:
        """The variance of every site, 0 where pruned."""
        return self._moments[1 + len(self.layout.shapes) :]

    @cached_property
    def locs(self) -> list[Tensor]:
        """The mean of every site in plain autograd operations, 0 where pruned."""
        return self.layout.views(self.layout.scatter(self.loc))

    @cached_property
    def scales(self) -> list[Tensor]:
        """The scale of every site in plain autograd operations, 0 where pruned."""
        return self.layout.views(self.layout.scatter(self.log_scale.exp()))

    def part(self, number: int, select: Callable[[Tensor], Tensor]) -> dist.TorchDistribution:
        """Return a distribution of the weights of site ``number`` that ``select`` picks, independent of the shared draw."""
        loc, scale, kept = self.locs[number], self.scales[number], self.layout.masks[number]
        if kept is None:
            return dist.Normal(select(loc), select(scale))
        return Pruned(dist.Normal(select(loc), select(torch.where(kept, scale, 1.0))), select(kept))

    def kl(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return KL(q ‖ N(loc, scale²)) of every site, shape [sites], for priors with one loc and one scale per site.

        Call this once, after taking the samples or moments and before the backward pass.
        """
        out = (self.__dict__.get("_moments") or self._sampled)[0]
        loc, scale = loc.to(self.loc), scale.to(self.loc)
        self._priors.loc, self._priors.scale = loc, scale
        with torch.no_grad():
            backend = kernels.backend(self.loc)
            out.detach().copy_(backend.kl(self.layout, self.loc, self.log_scale, loc, scale))
        return out


@dataclass
class _Priors:
    """The priors of the KL, which become known when the model has run and are needed by the backward pass."""

    loc: Tensor | None = None
    scale: Tensor | None = None


class _Samples(torch.autograd.Function):
    """(loc, log_scale) -> (KL per site, a sample of every site); :meth:`Draw.kl` fills in the KL later."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, layout: Layout, priors: _Priors) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        flat = kernels.backend(loc).sample(layout, loc, log_scale)
        ctx.save_for_backward(loc, log_scale, flat)
        ctx.layout, ctx.priors = layout, priors
        return (loc.new_zeros(len(layout.shapes)), *layout.views(flat))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        loc, log_scale, flat = ctx.saved_tensors
        backend, m, s, weight = _prior_terms(ctx, loc, weight)
        g = [None if grad is None else flatten(grad) for grad in grads]
        return (*backend.sample_grad(ctx.layout, g, flat, loc, log_scale, m, s, weight), None, None)


class _Moments(torch.autograd.Function):
    """(loc, log_scale) -> (KL per site, mean of every site, variance of every site); :meth:`Draw.kl` fills in the KL."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, layout: Layout, priors: _Priors) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        mean, variance = kernels.backend(loc).moments(layout, loc, log_scale)
        ctx.save_for_backward(loc, log_scale)
        ctx.layout, ctx.priors = layout, priors
        return (loc.new_zeros(len(layout.shapes)), *layout.views(mean), *layout.views(variance))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        loc, log_scale = ctx.saved_tensors
        backend, m, s, weight = _prior_terms(ctx, loc, weight)
        g = [None if grad is None else flatten(grad) for grad in grads]
        sites = len(ctx.layout.shapes)
        return (*backend.moments_grad(ctx.layout, g[:sites], g[sites:], loc, log_scale, m, s, weight), None, None)


def _prior_terms(ctx: Any, loc: Tensor, weight: Tensor | None) -> tuple[ModuleType, Tensor, Tensor, Tensor | None]:
    m, s = ctx.priors.loc, ctx.priors.scale
    if m is None:  # no KL was computed, so the loss does not depend on it
        m, s, weight = loc.new_zeros(len(ctx.layout.shapes)), loc.new_ones(len(ctx.layout.shapes)), None
    return kernels.backend(loc), m, s, weight


class SiteNormal(dist.TorchDistribution):
    """One site of a :class:`Draw`: N(loc, scale²) for kept weights and the constant 0 for pruned ones.

    The first sample is the site's part of the shared draw; further samples are independent.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = True
    knows_masks = True

    def __init__(self, draw: Draw, number: int):
        self.draw, self.number = draw, number
        self._first = True
        super().__init__(draw.layout.shapes[number], validate_args=False)

    @property
    def kept(self) -> Tensor | None:
        """Mask of the kept weights, or None if all are kept."""
        return self.draw.layout.masks[self.number]

    @property
    def loc(self) -> Tensor:
        return self.draw.locs[self.number]

    @property
    def scale(self) -> Tensor:
        return self.draw.scales[self.number]

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():  # the shared draw is left to rsample, whose caller needs its gradient
            return self.plain().sample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if self._first and not sample_shape:
            self._first = False
            return self.draw.samples[self.number]
        shape = Size(sample_shape) + self.batch_shape
        return self.loc + self.scale * torch.randn(shape, device=self.loc.device, dtype=self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.plain().log_prob(value)

    def entropy(self) -> Tensor:
        return self.plain().entropy()

    def expand(self, batch_shape: Any, _instance: Any = None) -> dist.TorchDistribution:
        return self if Size(batch_shape) == self.batch_shape else self.plain().expand(batch_shape)

    def plain(self) -> dist.TorchDistribution:
        """Return the same distribution as an object of Pyro's own classes."""
        return self.draw.part(self.number, lambda value: value)


@register_kl(SiteNormal, torch.distributions.Distribution)
def _kl_site_normal(q: SiteNormal, p: Any) -> Tensor:
    masks = [q.kept] if q.kept is not None else []
    if isinstance(p, Pruned):
        masks.append(p._mask)
        p = p.base_dist
    kl = kl_divergence(dist.Normal(q.loc, q.scale if q.kept is None else torch.where(q.kept, q.scale, 1.0)), p)
    for mask in masks:
        kl = torch.where(mask, kl, 0.0)
    return kl


def base(fn: Any) -> Any:
    """Return the distribution inside ``.to_event()``, or ``fn`` itself."""
    return fn.base_dist if isinstance(fn, dist.Independent) else fn


def one_number(fn: Any, kept: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """Return loc and scale, two scalars, of a Normal that is the same for every weight; None for other distributions.

    A :class:`Pruned` Normal qualifies if its mask is the same object as ``kept``.
    """
    fn = base(fn)
    if isinstance(fn, Pruned):
        if fn._mask is not kept:
            return None
        fn = fn.base_dist
    if type(fn) is not dist.Normal:
        return None
    for t in (fn.loc, fn.scale):
        if t.requires_grad or any(stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1):
            return None
    first = (0,) * fn.loc.ndim
    return fn.loc.detach()[first], fn.scale.detach()[first]
