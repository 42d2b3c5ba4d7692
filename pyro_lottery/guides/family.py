"""The interface of every guide, whatever its family, and the function that finds a guide's family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import singledispatch
from typing import Any

from torch import Size, Tensor
from torch.optim import Adam

from pyro_lottery.guides.places import Place
from pyro_lottery.types import Posterior


class Family:
    """The interface of every guide, whatever its family.

    This package's guides implement it themselves. :func:`family` wraps Pyro's, since AutoNormal and AutoStructured have other
    attributes that are called ``locs`` and ``scales``. All tensors are named by site and
    shaped like the site's parameters, which are unconstrained (see :class:`Place`).
    """

    is_point: bool = False
    """Every draw is the same, and there are no scales."""
    has_marginals: bool = True
    """Loc and scale of every site can be read; otherwise they are estimated from draws."""
    is_determined: bool = True
    """Loc and scale are all there is to know; otherwise a posterior keeps the raw parameters too, as ``extra``."""

    takes_kl_warmup: bool = True
    """The KL may have a smaller weight in the first epochs."""
    takes_ranks: bool = True
    """A training may be on several devices."""
    decays_as_prior: bool = False
    """Weight decay acts as a part of the prior: loc and scale are those under p(w) exp(−Nλw²/2T)."""
    scales_are_trained: bool = True
    """Otherwise they are found after the training (:func:`pyro_lottery.posteriors.find_scales_`)."""

    @property
    def takes_scales(self) -> bool:
        """Whether :meth:`set_` needs a posterior with scales."""
        return self.is_determined and not self.is_point

    def sites(self) -> Mapping[str, Place]:
        """Where each site is in the model."""
        raise NotImplementedError

    def locs(self) -> dict[str, Tensor]:
        """Views of every site's loc; writable, unless the guide is compressed. ``UserError`` without marginals."""
        raise NotImplementedError

    def scales(self) -> dict[str, Tensor]:
        """The scale of every site, with the site's shape; empty for a point guide."""
        return {}

    def values(self) -> dict[str, Tensor]:
        """Copies of every site's value at its loc."""
        places = self.sites()
        return {name: places[name].value_of(loc.clone()) for name, loc in self.locs().items()}

    def set_(self, posterior: Posterior) -> None:
        """Take the parameters from ``posterior``, which has been checked to fit, in place."""
        raise NotImplementedError

    def set_at_(self, where: Mapping[str, Tensor], posterior: Posterior) -> None:
        """:meth:`set_`, of the weights alone where the bool tensor of their site in ``where`` is True, if the family can do that."""
        self.set_(posterior)

    def relaid(
        self, parameter: Tensor, values: Tensor, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> Tensor:
        """``values`` of a compressed ``parameter`` under the masks ``before``, as they are under ``after``: 0 where a weight is new.

        ``parameter`` is the guide's own, uncompressed; masks are bool tensors of the sites' shapes.
        """
        return values

    def loc_parameters(self) -> list[Tensor]:
        """The parameters that are locs, to which weight decay applies."""
        return []

    def per_site(self) -> list[tuple[str, Tensor]]:
        """The parameters that belong to one site each, with its name."""
        return list(self.locs().items()) if self.has_marginals else []

    def drawn_shapes(self) -> dict[str, Size] | None:
        """The shapes of the values drawn for every site; None if only a draw can tell."""
        return None

    def compressed(self) -> AbstractContextManager[None]:
        """A context in which only surviving weights have parameters, if the family can do that."""
        return nullcontext()

    def training_point(self) -> AbstractContextManager[None]:
        """A context of a training, in which the guide is a point if its scales are not trained."""
        return nullcontext()

    def optimizer(self, groups: Iterable[dict[str, Any]], lr: float) -> Adam:
        """The optimizer of a training, over parameter groups with the learning rate ``lr``."""
        return Adam(groups, lr, fused=True)

    def step_begins(self, optimizer: Any, model: Any, done: int, steps: int) -> None:
        """Called before the step after ``done`` of ``steps`` steps of a training of ``model`` by ``optimizer``."""

    def step_ended(self, done: int, steps: int) -> None:
        """Called after step ``done``, counted from 1, of ``steps`` steps of a training."""

    def drawn_from(self) -> AbstractContextManager[None]:
        """A context for several draws, in which the surviving weights' parameters are looked up once and none may change."""
        return nullcontext()


@singledispatch
def family(guide: Any) -> Family:
    """The :class:`Family` of ``guide``. Each family registers itself, for a class of guides, in its own file."""
    raise NotImplementedError  # ``stock.Drawn`` is registered for whatever has no other family
