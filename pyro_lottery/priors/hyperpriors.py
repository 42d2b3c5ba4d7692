"""Hyperpriors: the sites that priors sample themselves, each of them once for all priors that name it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Size, nn

from pyro_lottery.distributions import base
from pyro_lottery.errors import UserError
from pyro_lottery.priors.by_site import Prior, of_site
from pyro_lottery.priors.tensors import tensors_of


class OneSite(Messenger):
    """Merges sample statements with the same name within this context: the first is sampled, the others get its value.

    The priors of several sites can therefore sample the same hyperprior. It acts on ``names``, or on all names if None.
    With ``check``, raises ``UserError`` if the distributions of one name differ.
    """

    def __init__(self, names: Iterable[str] | None = None, check: bool = False):
        super().__init__()
        self._names, self._check = None if names is None else set(names), check
        self._met: dict[str, tuple[Any, Any]] = {}

    def __exit__(self, *exception: Any) -> None:
        self._met.clear()
        super().__exit__(*exception)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._met:
            fn, value = self._met[msg["name"]]
            if self._check and not _same(fn, msg["fn"]):
                raise UserError(f"two priors sample {msg['name']!r} from different distributions; use two names")
            msg["value"], msg["done"], msg["stop"] = value, True, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._names is None or msg["name"] in self._names:
            self._met[msg["name"]] = msg["fn"], msg["value"]


def _same(one: Any, other: Any) -> bool:
    tensors = zip_longest(tensors_of(one), tensors_of(other))
    return type(one) is type(other) and all(a is b or (a is not None and torch.equal(a, b)) for a, b in tensors)


def traced(prior: Prior, site: str, shape: Size) -> tuple[Any, dict[str, Any]]:
    """The distribution per weight that a prior gives, and the distribution of each site that it samples itself.

    Raises ``UserError`` if the prior observes a site or calls ``pyro.param``.
    """
    trace = poutine.trace(lambda: of_site(prior, site, shape)).get_trace()
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample":
            if node["is_observed"]:
                raise UserError(f"the prior of {site!r} observes {name!r}; only a likelihood may observe")
            found[name] = node["fn"]
        if node["type"] == "param" and not isinstance(prior, nn.Module):
            raise UserError(
                f"the prior of {site!r} calls pyro.param({name!r}); use an nn.Parameter, which the model can own"
            )
    return base(trace.nodes["_RETURN"]["value"]), found
