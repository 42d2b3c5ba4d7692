"""Pyro's own guides: where they keep loc and scale, and what they need to obey masks and the KL temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuide,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.ops.hessian import hessian
from torch import Size, Tensor, nn

from pyro_lottery.distributions import Pruned, base
from pyro_lottery.errors import UserError
from pyro_lottery.guides.families import Own, Tempered
from pyro_lottery.guides.places import (
    Place,
    check_real,
    check_unmasked,
    model_of,
    normal_quantiles,
    probabilities,
)
from pyro_lottery.handlers import active_mask, left_out
from pyro_lottery.kernels import memory
from pyro_lottery.modes import evaluating
from pyro_lottery.threads import TURN

QUANTILE_DRAWS = 1000
"""Draws from which quantiles of a guide without closed-form marginals are estimated."""


def places_of(guide: AutoGuide) -> Mapping[str, Place]:
    """The places of a guide's sites; ``UserError`` if one of Pyro's has not met its model yet, or covers a network's
    weight that is not over all real numbers.
    """
    found = getattr(guide, "places", None)
    if found is not None:
        return found
    trace = guide.prototype_trace
    if trace is None or not all(trace.nodes.values()):  # AutoStructured empties it
        raise UserError(
            f"this {type(guide).__name__} has not met its model yet; build it with pyro_lottery.guides.auto"
        )
    weights = getattr(model_of(guide), "kaiming_scale", {})
    for name, site in trace.iter_stochastic_nodes():
        if isinstance(base(site["fn"]), Pruned):
            raise UserError(
                f"this {type(guide).__name__} met its model inside sparsify and keeps that mask; build it with "
                "pyro_lottery.guides.auto"
            )
        if name in weights:
            check_real(name, site["fn"])  # or loc would be read in another space than samples are drawn in
    return {name: Place.of(site) for name, site in trace.iter_stochastic_nodes()}


def is_point(guide: AutoGuide) -> bool:
    """Whether every draw of one of Pyro's guides is the same."""
    if isinstance(guide, AutoStructured) and isinstance(guide.conditionals, dict):
        return all(kind == "delta" for kind in guide.conditionals.values())
    return isinstance(guide, AutoDelta | AutoLaplaceApproximation)


def has_marginals(guide: AutoGuide) -> bool:
    """Whether loc and scale of every site can be read from one of Pyro's guides."""
    if isinstance(guide, AutoContinuous):
        places_of(guide)  # before which it has none
        return hasattr(guide, "loc")
    return isinstance(guide, AutoNormal | AutoDelta)


def locs_of(guide: AutoGuide) -> dict[str, Tensor]:
    """Writable views of every site's loc, in the parameters' space, of a guide that :func:`has_marginals`."""
    places = places_of(guide)
    if isinstance(guide, AutoContinuous):
        return _split(places, guide.loc.data)
    home = guide.locs if isinstance(guide, AutoNormal) else guide
    return {name: attrgetter(f"{name}_unconstrained")(home).data for name in places}


def scales_of(guide: AutoGuide) -> dict[str, Tensor]:
    """The scale of every site of a guide that :func:`has_marginals` and is no point."""
    if isinstance(guide, AutoContinuous):
        joint = guide.unmasked() if isinstance(guide, Joint) else guide.get_posterior()
        return _split(places_of(guide), joint.variance.sqrt())
    return {name: attrgetter(name)(guide.scales) for name in places_of(guide)}


def parts_of(guide: AutoGuide) -> list[AutoGuide]:
    """The parts of an AutoGuideList, or a list of ``guide`` alone."""
    parts: Any = guide
    return list(parts) if isinstance(guide, AutoGuideList) else [guide]


def device_of(guide: nn.Module) -> torch.device:
    """Where a guide's parameters are."""
    return next(chain(guide.parameters(), guide.buffers()), torch.empty(0)).device


def _split(places: Mapping[str, Place], flat: Tensor) -> dict[str, Tensor]:
    shapes = {name: place.real_shape for name, place in places.items()}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def values_of(guide: AutoGuide) -> dict[str, Tensor]:
    """Copies of every site's value at its loc, of a guide that :func:`has_marginals`."""
    with TURN, poutine.block():
        if isinstance(guide, AutoDelta):  # whose parameters are mapped by transform_to instead of biject_to
            return {name: attrgetter(name)(guide).detach().clone() for name in places_of(guide)}
        locs = locs_of(guide)
        return {name: place.value_of(locs[name].clone()) for name, place in places_of(guide).items()}


class Stock(Tempered):
    """What :func:`guides.auto` adds to each of Pyro's guides: the temperature, masks, medians and quantiles."""

    places: Mapping[str, Place] = MappingProxyType({})

    def masks(self) -> dict[str, Tensor | None]:
        """What the enclosing ``sparsify`` has for every site; ``UserError`` for a mask of a site that cannot have one."""
        device = device_of(self)
        masks = {name: active_mask(name, place.real_shape, device) for name, place in self.places.items()}
        check_unmasked(masks, {name: why for name, place in self.places.items() if (why := place.unprunable)})
        return masks

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.masks()
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every site; 0 where the enclosing ``sparsify`` prunes."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles [n, *shape] of every site for n numbers between 0 and 1; 0 where ``sparsify`` prunes.

        From 1000 draws where the marginals have no closed form.
        """
        if not has_marginals(self):
            return self._quantiles_of_draws(quantiles, *args, **kwargs)
        locs, scales = locs_of(self), {} if is_point(self) else scales_of(self)
        found = {}
        for name, mask in self.masks().items():
            loc, scale = locs[name], scales.get(name)
            if mask is not None:
                loc, scale = torch.where(mask, loc, 0.0), None if scale is None else torch.where(mask, scale, 0.0)
            found[name] = normal_quantiles(self.places[name], loc, scale, quantiles)
        return found

    def _quantiles_of_draws(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
            draws = [self(*args, **kwargs) for _ in range(QUANTILE_DRAWS)]
        every = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        for name, mask in self.masks().items():
            every[name] = every[name] if mask is None else torch.where(mask, every[name], 0.0)
        return {name: value.quantile(probabilities(quantiles, value), dim=0) for name, value in every.items()}


class Delta(Stock):
    """For AutoDelta, all whose quantiles are its values."""

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found, values = {}, values_of(self)
        for name, mask in self.masks().items():
            value = values[name] if mask is None else torch.where(mask, values[name], 0.0)
            found[name] = value.expand(len(probabilities(quantiles, value)), *value.shape)
        return found


class Structured(Stock):
    """For AutoStructured, whose medians are its locs: what a site's dependencies add is symmetric about 0."""

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        medians, masks = AutoStructured.median(self), self.masks()  # type: ignore[arg-type]
        return {name: v if (m := masks[name]) is None else torch.where(m, v, 0.0) for name, v in medians.items()}


class Joint(Stock, AutoContinuous):
    """For Pyro's guides that draw all weights as one vector: under a mask, the marginal of the surviving weights."""

    def unmasked(self) -> dist.TorchDistribution:
        """The joint distribution of all weights, whatever the mask."""
        return super().get_posterior()

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        joint = super().get_posterior(*args, **kwargs)
        surviving = self.surviving()
        if surviving is not None:
            return _Surviving(joint, surviving)
        base(joint).knows_masks = True  # of other sites, which sparsify need not look for in this vector
        return joint

    def surviving(self) -> Tensor | None:
        """Which entries of the joint vector the enclosing ``sparsify`` keeps; None for all."""
        masks = self.masks()
        if all(mask is None for mask in masks.values()):
            return None
        device = device_of(self)
        sizes = {name: place.real_shape.numel() for name, place in self.places.items()}
        parts = [
            torch.ones(sizes[name], dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
            for name, mask in masks.items()
        ]
        return torch.cat([part.to(device) for part in parts])


class Laplace(Joint):
    """For AutoLaplaceApproximation: a point until :meth:`laplace_approximation`, which gives it scales."""

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> AutoGuide:
        """The Gaussian at loc with covariance T·H⁻¹, an AutoMultivariateNormal like one of :func:`guides.auto`.

        H is the Hessian of −log p(D|w) − T·log p(w) over the surviving weights, so that this is Laplace's approximation
        of p(w)·p(D|w)^(1/T). ``args`` are the model's, the data for one; the network is in eval mode, as in predictions.
        Raises ``UserError`` where H is not positive definite, since loc is no maximum, or larger than the memory.
        """
        check_memory(AutoMultivariateNormal, [len(self.loc)], self.loc.device)
        with TURN, self._evaluating():
            drawn = poutine.trace(self).get_trace(*args, **kwargs)
            model = poutine.trace(poutine.replay(self.model, trace=drawn)).get_trace(*args, **kwargs)
            precision = hessian(drawn.log_prob_sum() - model.log_prob_sum(), self.loc).detach() / self._temperature
        kept = self.surviving()
        index = torch.arange(len(precision), device=precision.device) if kept is None else kept.nonzero().squeeze(1)
        try:
            inverse = torch.linalg.cholesky(precision[index[:, None], index]).cholesky_inverse()
            tril = torch.linalg.cholesky(inverse)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                "the Hessian at this guide's loc is not positive definite, so loc is not a maximum; train it further"
            ) from error
        found = adapted(AutoMultivariateNormal)(self.model)
        with TURN, poutine.block(), left_out(), self._evaluating():
            found._setup_prototype(*args, **kwargs)
        found.places = self.places
        found.to(self.loc.device)
        with torch.no_grad():
            found.loc.copy_(self.loc if kept is None else torch.where(kept, self.loc, 0.0))
            found.scale = torch.ones_like(self.loc).index_copy(0, index, tril.diagonal())
            unit = torch.eye(len(precision), dtype=tril.dtype, device=tril.device)
            unit[index[:, None], index] = tril / tril.diagonal()[:, None]
            found.scale_tril = unit
        return found

    def _evaluating(self) -> AbstractContextManager[None]:
        model = model_of(self)
        return evaluating(model) if isinstance(model, nn.Module) else nullcontext()


class Parts(Own, AutoGuideList):
    """For AutoGuideList, whose parts bring the temperature and obey masks themselves."""

    places: Mapping[str, Place] = MappingProxyType({})

    def append(self, part: Any) -> Any:
        """Add a guide of some of the model's sites; ``UserError`` for a site that another part has."""
        if not isinstance(part, AutoGuide):
            raise UserError(f"a part is a guide built by guides.mean_field or guides.auto, got a {type(part).__name__}")
        taken = {name for other in parts_of(self) for name in places_of(other)}
        for name in places_of(part):
            if name in taken or name not in self.places:
                raise UserError(
                    f"site {name!r} is {'in another part already' if name in taken else 'not in the model'}"
                )
        super().append(part)


_NUMBERS: dict[type[AutoGuide], Callable[[Sequence[int]], float]] = {
    AutoMultivariateNormal: lambda sizes: 16 * sum(sizes) ** 2,
    AutoLowRankMultivariateNormal: lambda sizes: 13 * sum(sizes) ** 1.5,  # its rank is the root of that sum
    AutoIAFNormal: lambda sizes: 91 * sum(sizes) ** 2,  # autoregressive networks of as many units, and their masks
    AutoStructured: lambda sizes: 6.5 * sum(size**2 for size in sizes),  # a covariance for each site
}
"""How many float32 numbers training holds at its peak with Pyro's guides over sites of these sizes, to leading order:
parameters, gradients, Adam's moments and intermediate results, by the greatest peak measured.
"""


def check_memory(kind: type[AutoGuide], sizes: Sequence[int], device: torch.device) -> None:
    """Raise ``UserError`` for a covariance that is larger than the machine's memory, with the memory it would need."""
    count = next((count for known, count in _NUMBERS.items() if issubclass(kind, known)), None)
    if count is None:
        return
    needed = 4 * count(sizes)
    here = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory()
    if needed > here:
        raise UserError(
            f"a {kind.__name__} over {sum(sizes):,} weights needs {needed / 2**30:,.1f} GiB to train, and there are "
            f"{here / 2**30:,.1f} GiB; use mean_field or a smaller network"
        )


def adapted(kind: type[AutoGuide]) -> Any:
    """One of Pyro's guides as a class that obeys masks and the KL temperature."""
    bases: list[tuple[type[AutoGuide], type[AutoGuide]]] = [
        (AutoLaplaceApproximation, Laplace), (AutoContinuous, Joint), (AutoDelta, Delta), (AutoStructured, Structured),
        (AutoGuideList, Parts), (AutoGuide, Stock),
    ]  # fmt: skip
    ours = next(base for known, base in bases if issubclass(kind, known))
    return type(kind.__name__, (ours, kind), {})


class _Surviving(dist.TorchDistribution):
    """The marginal of a joint Gaussian over the weights that a mask keeps, as a vector with zeros elsewhere."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True
    knows_masks = True

    def __init__(self, joint: dist.TorchDistribution, mask: Tensor):
        self.index = mask.nonzero().squeeze(1)
        self.size = len(mask)
        self.marginal = _marginal(joint, self.index)
        super().__init__(event_shape=Size((self.size,)), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        values = self.marginal.rsample(sample_shape)
        return values.new_zeros(*sample_shape, self.size).index_copy(-1, self.index, values)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.marginal.log_prob(value[..., self.index])


def _marginal(joint: dist.TorchDistribution, index: Tensor) -> dist.TorchDistribution:
    if isinstance(joint, dist.Independent) and isinstance(joint.base_dist, dist.Delta):
        return dist.Delta(joint.base_dist.v[index], event_dim=1)
    if isinstance(joint, dist.Independent) and isinstance(joint.base_dist, dist.Normal):
        return dist.Normal(joint.base_dist.loc[index], joint.base_dist.scale[index]).to_event(1)
    if isinstance(joint, dist.MultivariateNormal):
        rows = joint.scale_tril[index]
        return dist.MultivariateNormal(joint.loc[index], covariance_matrix=rows @ rows.mT)
    if isinstance(joint, dist.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(joint.loc[index], joint.cov_factor[index], joint.cov_diag[index])
    raise UserError(
        f"a {type(joint).__name__} guide has no closed-form marginal over the surviving weights, so it cannot be pruned; "
        "use mean_field, AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal or AutoMultivariateNormal"
    )
