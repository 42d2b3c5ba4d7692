"""Pyro's guides with the KL temperature, masks, medians and quantiles, which ``guides.auto`` adds."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery.guides.base import Tempered, device_of
from pyro_lottery.guides.family import family
from pyro_lottery.guides.places import Place, check_unmasked
from pyro_lottery.handlers import active_mask


class Adapted(Tempered):
    """A guide of Pyro that applies the KL temperature and obeys masks."""

    places: Mapping[str, Place] = MappingProxyType({})

    def masks(self) -> dict[str, Tensor | None]:
        """The mask of every site in the enclosing ``sparsify``; ``UserError`` for a mask of a site that cannot have one."""
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
        own: Any = family(self)
        return own.median(self.masks(), *args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles [n, *shape] of every site for n numbers between 0 and 1; 0 where ``sparsify`` prunes.

        They are estimated from 1000 draws where the marginals have no closed form.
        """
        own: Any = family(self)
        return own.quantiles(quantiles, self.masks(), *args, **kwargs)


def adapted(kind: type[AutoGuide], by: type[AutoGuide]) -> Any:
    """A class with the name of ``kind``, one of Pyro's guides, that inherits from ``by`` and then from ``kind``."""
    return type(kind.__name__, (by, kind), {})
