"""One draw of a mean-field Normal over all sites, with its closed-form KL in the same autograd node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_lottery import kernels
from pyro_lottery.distributions.pruned import Pruned
from pyro_lottery.kernels import Layout


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
        found = _Samples.apply(self.loc, self.log_scale, self.layout, self._priors)  # type: ignore[no-untyped-call]
        self.layout.note_kept(found[1:])
        return found  # type: ignore[no-any-return]

    @cached_property
    def _moments(self) -> tuple[Tensor, ...]:
        found = _Moments.apply(self.loc, self.log_scale, self.layout, self._priors)  # type: ignore[no-untyped-call]
        means, variances = found[1 : 1 + (half := len(found) // 2)], found[1 + half :]
        self.layout.note_kept(means)
        self.layout.note_kept(variances)
        return (found[0], *means[: len(self.layout.shapes)], *variances[: len(self.layout.shapes)])

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """One weight sample of every site; a pruned site's knows its surviving weights (``kernels.kept``)."""
        return self._sampled[1 : 1 + len(self.layout.shapes)]

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


def spread(flat: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Every site's view of a vector of the kept weights, 0 where pruned, with its surviving weights (``kernels.kept``)."""
    found: tuple[Tensor, ...] = _Spread.apply(flat, layout)  # type: ignore[no-untyped-call]
    layout.note_kept(found)
    return found[: len(layout.shapes)]


class _Spread(torch.autograd.Function):
    """Kept weights -> (every site, its kept weights); the gradient takes the time of the kept weights."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        return tuple(layout.views_and_kept(layout.scatter(flat), flat))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        like = next(grad for grad in grads if grad is not None)
        at_once = kernels.backend(like) is not kernels.compiled
        parts = zip(ctx.layout.kept_of(grads, at_once), ctx.layout.kept, strict=True)
        return torch.cat([like.new_zeros(count) if part is None else part for part, count in parts]), None


@dataclass
class _Priors:
    """The priors of the KL, which become known when the model has run and are needed by the backward pass."""

    loc: Tensor | None = None
    scale: Tensor | None = None


class _Samples(torch.autograd.Function):
    """(loc, log_scale) -> (KL per site, a sample of every site, its kept weights); :meth:`Draw.kl` fills in the KL later."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, layout: Layout, priors: _Priors) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        flat, kept = kernels.backend(loc).sample(layout, loc, log_scale)
        ctx.save_for_backward(loc, log_scale, kept)
        ctx.layout, ctx.priors = layout, priors
        return (loc.new_empty(len(layout.shapes)), *layout.views_and_kept(flat, kept))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        loc, log_scale, kept = ctx.saved_tensors
        backend, m, s, weight = _prior_terms(ctx, loc, weight)
        g = ctx.layout.kept_of(grads, backend is not kernels.compiled)
        return (*backend.sample_grad(ctx.layout, g, kept, loc, log_scale, m, s, weight), None, None)


class _Moments(torch.autograd.Function):
    """(loc, log_scale) -> (KL per site, means of every site and of its kept weights, variances likewise); :meth:`Draw.kl` fills
    in the KL.
    """

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, layout: Layout, priors: _Priors) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        mean, variance = kernels.backend(loc).moments(layout, loc, log_scale)
        ctx.save_for_backward(loc, log_scale)
        ctx.layout, ctx.priors = layout, priors
        both = (layout.views_and_kept(flat, layout.keep(flat)) for flat in (mean, variance))
        return (loc.new_empty(len(layout.shapes)), *next(both), *next(both))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        loc, log_scale = ctx.saved_tensors
        backend, m, s, weight = _prior_terms(ctx, loc, weight)
        halves = grads[: len(grads) // 2], grads[len(grads) // 2 :]
        g_mean, g_variance = (ctx.layout.kept_of(half, backend is not kernels.compiled) for half in halves)
        return (
            *backend.moments_grad(ctx.layout, g_mean, g_variance, loc, log_scale, m, s, weight), None, None,
        )  # fmt: skip


def _prior_terms(ctx: Any, loc: Tensor, weight: Tensor | None) -> tuple[ModuleType, Tensor, Tensor, Tensor | None]:
    m, s = ctx.priors.loc, ctx.priors.scale
    if m is None:  # no KL was computed, so the loss does not depend on it
        m, s, weight = loc.new_zeros(len(ctx.layout.shapes)), loc.new_ones(len(ctx.layout.shapes)), None
    return kernels.backend(loc), m, s, weight
