"""A network that uses given values as weights, without asking Pyro."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_lottery.handlers.used_weights import fix_masks_, fixed_masks
from pyro_lottery.machine import contiguous_
from pyro_lottery.types import Mask


@contextmanager
def with_weights(net: nn.Module, values: Mapping[str, Tensor], mask: Mask | None = None) -> Iterator[None]:
    """Use ``values``, by site and of the sites' shapes, as weights of ``net`` within this context, without asking Pyro at every use.

    A layer that transforms its weight, after which no pruned weight is 0, applies ``mask`` afterwards; without one, that of an enclosing ``sparsify``.
    """
    places = [(site.rpartition("."), value) for site, value in values.items()]
    layers = [(vars(net.get_submodule(path)), name, value) for (path, _, name), value in places]
    before = [layer.get(name) for layer, name, _ in layers]  # of a network that predicts within its own prediction
    try:
        for layer, name, value in layers:
            layer[name] = value  # which Python finds before the site of this name
        with nullcontext() if mask is None else fixed_masks(net, mask):
            yield
    finally:
        for (layer, name, _), old in zip(layers, before, strict=True):
            layer.pop(name, None)
            if old is not None:
                layer[name] = old


def bare(net: nn.Module, sites: Iterable[str], mask: Mask) -> nn.Module:
    """A copy of a Bayesian network ``net`` in eval mode as the torch module it was made from, without the parameters ``sites``.

    It runs within :func:`with_weights`. Layers that transform their weights apply ``mask`` afterwards, as under ``sparsify``.
    A module that is a PyroModule by its own class stays one.
    """
    found: Any = copy.deepcopy(net)
    mixed: Any = PyroModule
    fix_masks_(found, mask)
    for site in sites:
        path, _, name = site.rpartition(".")
        layer = found.get_submodule(path)
        del layer._modules[f"{name}_prior"], layer._buffers[f"{name}_init"], layer._pyro_samples[name]
    for module in found.modules():
        base = type(module).__bases__[0]
        if not issubclass(base, PyroModule) and mixed[base] is type(module):
            module.__class__ = base
            for name in [name for name in vars(module) if name.startswith("_pyro_")]:
                del vars(module)[name]
    return found.eval()


def plain(net: nn.Module, values: Mapping[str, Tensor], mask: Mask) -> nn.Module:
    """A copy of a Bayesian network ``net`` as the torch module it was made from, with ``values`` by site as its parameters.

    Its tensors are in torch's usual layout.
    """
    found = bare(net, values, mask)
    for site, value in values.items():
        path, _, name = site.rpartition(".")
        found.get_submodule(path).register_parameter(name, nn.Parameter(value.detach().clone()))
    contiguous_(found)
    return found


class Ensemble(nn.Module):
    """Networks whose outputs for a batch of n examples are joined to [networks · n, ...], one network after the other."""

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.num_estimators = len(self.networks)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The outputs of all networks."""
        return torch.cat([network(*inputs, **named) for network in self.networks])
