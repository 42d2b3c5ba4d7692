"""Distributions of weights in which pruned weights are 0."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


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

    def __init__(self, v: Tensor, event_dim: int = 0):
        self.v, batch = v, v.shape[: v.dim() - event_dim]
        dist.TorchDistribution.__init__(self, batch, v.shape[len(batch) :])

    @property
    def log_density(self) -> Tensor:
        """0 [batch shape], made when it is asked for: each would be a kernel to launch."""
        return self.v.new_zeros(self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PointMass:
        return PointMass(self.v.expand(*batch_shape, *self.event_shape), len(self.event_shape))
