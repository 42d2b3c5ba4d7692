"""Pyro's own guides: where they keep loc and scale."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoNormal, AutoStructured
from torch import Tensor
from torch.distributions import transform_to

from pyro_lottery.distributions import Pruned, base
from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import model_of
from pyro_lottery.guides.family import Family, family
from pyro_lottery.guides.places import Place
from pyro_lottery.guides.preimage import preimage
from pyro_lottery.guides.quantiles import normal_quantiles, probabilities
from pyro_lottery.guides.supports import check_real
from pyro_lottery.masks import zeroed
from pyro_lottery.threads import TURN
from pyro_lottery.types import Posterior

QUANTILE_DRAWS = 1000
"""Draws from which quantiles of a guide without closed-form marginals are estimated."""

Masks = Mapping[str, Tensor | None]


class Stock(Family):
    """A guide of Pyro's, with a loc for every site and perhaps a scale."""

    def __init__(self, guide: Any):
        self.guide = guide

    def sites(self) -> Mapping[str, Place]:
        return _places_of(self.guide)

    def set_(self, posterior: Posterior) -> None:
        if self.is_determined:
            for name, value in self.locs().items():
                value.copy_(posterior.loc[name])
        elif posterior.extra:
            self.guide.load_state_dict(dict(posterior.extra))
        else:
            raise UserError(
                f"loc and scale do not determine guide {type(self.guide).__name__}; give a posterior that pl.posterior read from such a guide, whose extra holds its parameters"
            )

    def median(self, masks: Masks, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every site under ``masks``."""
        return {name: value[0] for name, value in self.quantiles([0.5], masks, *args, **kwargs).items()}

    def quantiles(self, quantiles: Any, masks: Masks, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles [n, *shape] of every site under ``masks``."""
        locs, scales, places = self.locs(), self.scales(), self.sites()
        found = {}
        for name, mask in masks.items():
            scale = zeroed(scales[name], mask) if scales else None
            found[name] = normal_quantiles(places[name], zeroed(locs[name], mask), scale, quantiles)
        return found


class Drawn(Stock):
    """A guide without closed-form marginals, such as a normalising flow: they are estimated from draws."""

    has_marginals = False
    is_determined = False

    def locs(self) -> dict[str, Tensor]:
        raise UserError(
            f"guide {type(self.guide).__name__} has no loc per weight; read it with guides.posterior, from draws"
        )

    def quantiles(self, quantiles: Any, masks: Masks, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with TURN, poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
            draws = [self.guide(*args, **kwargs) for _ in range(QUANTILE_DRAWS)]
        every = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        kept = {name: zeroed(every[name], mask) for name, mask in masks.items()}
        return {name: value.quantile(probabilities(quantiles, value), dim=0) for name, value in kept.items()}


family.register(object, Drawn)


class StockNormal(Stock):
    """AutoNormal: the sites are independent, and a scale is a transform of its parameter."""

    def locs(self) -> dict[str, Tensor]:
        return {name: attrgetter(f"{name}_unconstrained")(self.guide.locs).data for name in self.sites()}

    def scales(self) -> dict[str, Tensor]:
        return {name: attrgetter(name)(self.guide.scales) for name in self.sites()}

    def set_(self, posterior: Posterior) -> None:
        assert posterior.scale is not None  # as Family.takes_scales asks
        super().set_(posterior)
        transform = transform_to(self.guide.scale_constraint)
        for name in self.sites():
            parameter = attrgetter(f"{name}_unconstrained")(self.guide.scales)
            parameter.data.copy_(preimage(transform, posterior.scale[name].to(parameter)))

    def loc_parameters(self) -> list[Tensor]:
        return list(self.guide.locs.parameters())


family.register(AutoNormal, StockNormal)


class StockDelta(Stock):
    """AutoDelta: a point, whose parameters are mapped by ``transform_to`` instead of ``biject_to``."""

    is_point = True

    def locs(self) -> dict[str, Tensor]:
        return {name: attrgetter(f"{name}_unconstrained")(self.guide).data for name in self.sites()}

    def values(self) -> dict[str, Tensor]:
        return {name: attrgetter(name)(self.guide).detach().clone() for name in self.sites()}

    def loc_parameters(self) -> list[Tensor]:
        return list(self.guide.parameters())

    def quantiles(self, quantiles: Any, masks: Masks, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        values = {name: zeroed(value, masks[name]) for name, value in self.values().items()}
        return {
            name: value.expand(len(probabilities(quantiles, value)), *value.shape) for name, value in values.items()
        }


family.register(AutoDelta, StockDelta)


class StockStructured(Drawn):
    """AutoStructured: the sites that a site depends on add terms symmetric about 0, so its median is its loc."""

    def __init__(self, guide: AutoStructured):
        super().__init__(guide)
        kinds = guide.conditionals.values() if isinstance(guide.conditionals, dict) else [guide.conditionals]
        self.is_point = all(kind == "delta" for kind in kinds)

    def median(self, masks: Masks, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: zeroed(value, masks[name]) for name, value in AutoStructured.median(self.guide).items()}


family.register(AutoStructured, StockStructured)


def _places_of(guide: AutoGuide) -> Mapping[str, Place]:
    """Where each site of a guide is in its model.

    Raises ``UserError`` for a guide of Pyro's that has not met its model yet, or has met it inside ``sparsify``, and for a
    network's weight that is not over all real numbers.
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
            check_real(name, site["fn"])  # or loc would be in another space than the samples
    return {name: Place.of(site) for name, site in trace.iter_stochastic_nodes()}
