"""Pyro's guides that draw all weights as one vector: AutoMultivariateNormal, full, low-rank or diagonal, and flows."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous
from torch import Size, Tensor

from pyro_lottery.distributions import base
from pyro_lottery.errors import UserError
from pyro_lottery.guides.adapted import Adapted
from pyro_lottery.guides.base import device_of
from pyro_lottery.guides.family import Family, family
from pyro_lottery.guides.stock import Drawn, Stock


class StockJoint(Stock):
    """One joint Gaussian, whose covariance a site's scale does not determine."""

    is_determined = False

    def locs(self) -> dict[str, Tensor]:
        return self._split(self.guide.loc.data)

    def scales(self) -> dict[str, Tensor]:
        joint = getattr(self.guide, "unmasked", self.guide.get_posterior)()
        return self._split(joint.variance.sqrt())

    def loc_parameters(self) -> list[Tensor]:
        return [self.guide.loc]

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        shapes = {name: place.real_shape for name, place in self.sites().items()}
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


@family.register
def _(guide: AutoContinuous) -> Family:
    return StockJoint(guide) if hasattr(guide, "loc") else Drawn(guide)  # a flow has no loc


class AdaptedJoint(Adapted, AutoContinuous):
    """A joint guide which is, under a mask, the marginal of the surviving weights."""

    _known: tuple[tuple[Tensor | None, ...], Tensor, Tensor] | None = None
    """The last masks, and what :meth:`_survivors` returned for them: a GPU is waited for once a mask."""

    def unmasked(self) -> dist.TorchDistribution:
        """The joint distribution of all weights, whatever the mask."""
        return super().get_posterior()

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        joint = super().get_posterior(*args, **kwargs)
        found = self._survivors()
        if found is not None:
            return _Surviving(joint, *found)
        base(joint).knows_masks = True  # so that sparsify lets this vector pass under a mask of other sites
        return joint

    def surviving(self) -> Tensor | None:
        """The mask [n] of the joint vector in the enclosing ``sparsify``; None where nothing is pruned."""
        found = self._survivors()
        return None if found is None else found[0]

    def _survivors(self) -> tuple[Tensor, Tensor] | None:
        """The mask [n] of the joint vector, and the places of surviving weights; None where nothing is pruned."""
        masks = self.masks()
        if all(mask is None for mask in masks.values()):
            return None
        met, device = tuple(masks.values()), device_of(self)
        if self._known is not None and all(a is b for a, b in zip(self._known[0], met, strict=True)):
            return self._known[1:]
        sizes = {name: place.real_shape.numel() for name, place in self.places.items()}
        parts = [
            torch.ones(sizes[name], dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
            for name, mask in masks.items()
        ]
        with torch.inference_mode(False):  # it may be used outside
            mask = torch.cat([part.to(device) for part in parts])
            self._known = met, mask, mask.nonzero().squeeze(1)
        return self._known[1:]


class _Surviving(dist.TorchDistribution):
    """The marginal of a joint Gaussian over the weights that a mask keeps, as a vector with zeros elsewhere."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True
    knows_masks = True

    def __init__(self, joint: dist.TorchDistribution, mask: Tensor, index: Tensor):
        self.index = index
        self.size = len(mask)
        self.marginal = marginal(joint, self.index)
        super().__init__(event_shape=Size((self.size,)), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        values = self.marginal.rsample(sample_shape)
        return values.new_zeros(*sample_shape, self.size).index_copy(-1, self.index, values)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.marginal.log_prob(value[..., self.index])


def marginal(joint: dist.TorchDistribution, index: Tensor) -> dist.TorchDistribution:
    """The marginal of a joint Gaussian or point mass over the entries ``index`` [m]; ``UserError`` for anything else."""
    if isinstance(joint, dist.Independent) and isinstance(joint.base_dist, dist.Delta):
        return dist.Delta(joint.base_dist.v[index], event_dim=1)
    if isinstance(joint, dist.Independent) and isinstance(joint.base_dist, dist.Normal):
        return dist.Normal(joint.base_dist.loc[index], joint.base_dist.scale[index]).to_event(1)
    if isinstance(joint, dist.MultivariateNormal):
        # The factor L of rows · rowsᵀ = L Lᵀ by QR: in single precision the product itself need not be positive definite.
        upper = torch.linalg.qr(joint.scale_tril[index].mT, mode="reduced").R
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)
        return dist.MultivariateNormal(joint.loc[index], scale_tril=(signs[:, None] * upper).mT)
    if isinstance(joint, dist.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(joint.loc[index], joint.cov_factor[index], joint.cov_diag[index])
    raise UserError(
        f"a {type(joint).__name__} guide has no closed-form marginal over the surviving weights, so it cannot be pruned; "
        "use mean_field, AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal or AutoMultivariateNormal"
    )
