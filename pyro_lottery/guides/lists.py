"""AutoGuideList: a guide of guides, one for each group of sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from pyro.infer.autoguide import AutoGuide, AutoGuideList
from torch import Tensor

from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import Copyable, in_network_order
from pyro_lottery.guides.family import family
from pyro_lottery.guides.places import Place
from pyro_lottery.guides.stock import Drawn


class StockList(Drawn):
    """An AutoGuideList, whose sites, locs and scales are those of all its parts."""

    def __init__(self, guide: AutoGuideList):
        super().__init__(guide)
        self.parts = [family(part) for part in guide]
        self.is_point = all(part.is_point for part in self.parts)
        self.has_marginals = all(part.has_marginals for part in self.parts)

    def sites(self) -> Mapping[str, Place]:
        return {name: place for part in self.parts for name, place in part.sites().items()}

    def locs(self) -> dict[str, Tensor]:
        return self._merged(part.locs() for part in self.parts) if self.has_marginals else super().locs()

    def scales(self) -> dict[str, Tensor]:
        points = [type(g).__name__ for g, part in zip(self.guide, self.parts, strict=True) if part.is_point]
        if points and not self.is_point:
            raise UserError(
                f"{points[0]}, a part of this guide, is a point and has no scale; read the other parts with guides.posterior"
            )
        return self._merged(part.scales() for part in self.parts)

    def values(self) -> dict[str, Tensor]:
        return self._merged(part.values() for part in self.parts)

    def loc_parameters(self) -> list[Tensor]:
        return [parameter for part in self.parts for parameter in part.loc_parameters()]

    def _merged(self, parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        return in_network_order(self.guide, {name: value for part in parts for name, value in part.items()})


family.register(AutoGuideList, StockList)


class AdaptedList(Copyable, AutoGuideList):
    """A list of guides that apply the KL temperature and masks themselves."""

    places: Mapping[str, Place] = MappingProxyType({})

    def append(self, part: Any) -> Any:
        """Add a guide of some of the model's sites; ``UserError`` for a site that another part has."""
        if not isinstance(part, AutoGuide):
            raise UserError(f"a part is a guide built by guides.mean_field or guides.auto, got a {type(part).__name__}")
        taken = family(self).sites()
        for name in family(part).sites():
            if name in taken or name not in self.places:
                raise UserError(
                    f"site {name!r} is {'in another part already' if name in taken else 'not in the model'}; give each site of the model to one part"
                )
        super().append(part)
