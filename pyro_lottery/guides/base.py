"""Base classes of all guides of this package, including those adapted from Pyro."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_lottery.handlers import not_hidden
from pyro_lottery.priors.own_parameters import keep_parameters_


class Copyable(AutoGuide):
    """A guide with parameters of its own, which can be copied without harm to it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        keep_parameters_(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with not_hidden():  # since Pyro's Importance, for one, hides the handlers around it
            return super().__call__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own version sets the model of the guide that is copied to None.
        return self.__dict__ | {"master": None}

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        keep_parameters_(self)  # again, since Pyro refuses to put a module that has been called into a list
        super()._pyro_set_supermodule(name, context)


class Tempered(Copyable):
    """A guide that scales its sites by the KL temperature of its model."""

    @property
    def _temperature(self) -> float:
        return getattr(model_of(self), "kl_temperature", 1.0)  # at each call, since the model's may be changed

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # The prior's sites have the same factor, so that both together are T·KL for any estimator of the ELBO.
        with poutine.scale(scale=self._temperature):
            return super().forward(*args, **kwargs)


def model_of(guide: AutoGuide) -> Any:
    """The model that a guide was built for, without the handlers around it.

    Pyro's ``poutine.unwrap`` does not find it in a copy of a guide.
    """
    found: Any = guide.model
    while isinstance(found, partial):
        handled = len(found.args) > 1 and isinstance(found.args[0], Messenger)
        found = found.args[1] if handled else found.func
    return found


def in_network_order(guide: AutoGuide, sites: dict[str, Tensor]) -> dict[str, Tensor]:
    """``sites`` in the network's order, in which ties are settled; sites of hyperpriors come last."""
    order = getattr(model_of(guide), "sites", ())
    return {name: sites[name] for name in dict.fromkeys([*(n for n in order if n in sites), *sites])}


def device_of(guide: Any) -> torch.device:
    """Where a guide's parameters are; the CPU for a guide that is no module."""
    tensors = chain(guide.parameters(), guide.buffers()) if isinstance(guide, nn.Module) else iter(())
    return next(tensors, torch.empty(0)).device
