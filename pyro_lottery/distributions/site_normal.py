"""One site of a shared draw, as a distribution."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_lottery.distributions.draw import Draw
from pyro_lottery.distributions.pruned import Pruned


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
