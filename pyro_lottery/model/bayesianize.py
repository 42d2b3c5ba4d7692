"""Turns the parameters of a plain network into Pyro sample sites, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import pyro_method, to_pyro_module_
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from pyro_lottery.errors import UserError
from pyro_lottery.handlers.used_weights import mask_what_is_used_
from pyro_lottery.model.layers import LAYERS, fan_in, kaiming_scale, random_parameters
from pyro_lottery.priors import FanIn, OneSite, Prior, SitePrior
from pyro_lottery.priors.own_parameters import keep_parameters_
from pyro_lottery.threads import TURN
from pyro_lottery.types import Sites


def bayesianize_(net: nn.Module, priors: Mapping[str, Prior]) -> dict[str, float]:
    """Turn every parameter that ``priors`` names into a Pyro sample site, in place.

    A site keeps the name and the shape of its parameter. The parameter's value becomes the buffer ``NAME_init`` (not in
    the state dict), from which a guide takes its initial loc. Returns the Kaiming scale of every site. Raises
    ``UserError`` if a prior does not fit its site.
    """
    found = [(site, layer, name) for site, layer, name in random_parameters(net) if site in priors]
    scales = {site: kaiming_scale(layer, name) for site, layer, name in found}
    values = {site: getattr(layer, name).detach().clone() for site, layer, name in found}
    for site, layer, name in found:
        if taken := [part for part in (f"{name}_init", f"{name}_prior") if hasattr(layer, part)]:
            raise UserError(
                f"the layer of {site!r} has an attribute {taken[0]!r}, which a random layer needs for itself; rename it"
            )
    own = site_priors(_told_inputs(priors, found), values)  # before any change
    for site, layer, name in found:
        if name == "weight" and isinstance(layer, LAYERS):
            mask_what_is_used_(layer, name, site)
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{path!r} is a ScriptModule, which cannot be part of a Pyro module; give the module that it was made from"
            )
        _mix(type(module))
    to_pyro_module_(net)
    for path, module in net.named_modules():
        # Pyro would name the sites of a module that is used twice by its last place
        if isinstance(module, PyroModule):
            module._pyro_name = path
    keep_parameters_(net)
    for site, layer, name in found:
        value = values[site]
        setattr(layer, f"{name}_prior", own[site])
        setattr(layer, name, PyroSample(_PriorOf(name)))
        layer.register_buffer(f"{name}_init", value, persistent=False)
    return scales


def _new(kind: type[nn.Module]) -> Any:
    """An empty PyroModule of the class ``kind``, for pickle."""
    _mix(kind)
    return type(PyroModule)._New(kind)


def _mix(kind: type[nn.Module]) -> None:
    """Let Pyro make a PyroModule of the class ``kind`` though its metaclass is another, such as that of abstract classes."""
    if kind is nn.Module or issubclass(kind, PyroModule) or kind in type(PyroModule)._pyro_mixin_cache:
        return
    above: list[Any] = []
    for base in kind.__bases__:
        if issubclass(base, nn.Module):
            _mix(base)
            above.append(PyroModule[base])
    every = dict.fromkeys((type(PyroModule), *(type(each) for each in (kind, *above))))
    own = tuple(m for m in every if not any(m is not other and issubclass(other, m) for other in every))
    if own == (type(PyroModule),):
        return  # Pyro can do this by itself
    metaclass: Any = own[0] if len(own) == 1 else type("_Mixed", own, {})

    def reduce(self: Any) -> Any:  # as in PyroModule[...]
        return _new, (kind,), getattr(self, "__getstate__", self.__dict__.copy)()

    mixed = metaclass(f"Pyro{kind.__name__}", (kind, *above), {"__reduce__": reduce, "__module__": kind.__module__})
    type(PyroModule)._pyro_mixin_cache[kind] = mixed


def _told_inputs(priors: Mapping[str, Prior], found: Iterable[tuple[str, Any, str]]) -> dict[str, Prior]:
    """``priors``, of which those by the number of inputs are told it where a weight's shape [inputs, outputs, ...] is the other way round."""

    def told(prior: FanIn, inputs: int) -> Prior:
        return lambda site, shape: prior.of(inputs)

    own = dict(priors)
    for site, layer, name in found:
        if isinstance(prior := own[site], FanIn) and isinstance(layer, _ConvTransposeNd) and name == "weight":
            own[site] = told(prior, fan_in(layer, name))
    return own


def site_priors(said: Mapping[str, Prior], values: Sites) -> dict[str, SitePrior]:
    """The prior of every site, with the device and dtype of the site."""
    with TURN, poutine.block(), OneSite(check=True):  # samples hyperpriors once, to find what depends on them
        found = {
            site: SitePrior(site, said[site], value.shape).to(value.device, value.dtype)
            for site, value in values.items()
        }
    for site, own in found.items():
        for name in {*values, "y", "data"} & {*own.hyper_sites}:
            raise UserError(
                f"the prior of {site!r} samples {name!r}, which is the name of another site; choose another name"
            )
    return found


with_gradients: ContextVar[bool] = ContextVar("with_gradients", default=False)
"""Whether the running model was called with gradients enabled."""


def _check_gradients(layer: Any, name: str) -> None:
    """Raise ``UserError`` if a weight is used during training where it gets no gradient."""
    if torch._C._current_graph_task_id() != -1:  # a backward pass is running; torch.utils.checkpoint tests it like this
        raise UserError(
            f"gradient checkpointing reruns {layer._pyro_get_fullname(name)!r} in the backward pass, which would draw new "
            "weights; switch checkpointing off"
        )
    if with_gradients.get() and not torch.is_grad_enabled():
        raise UserError(
            f"{layer._pyro_get_fullname(name)!r} is used with gradients disabled (reentrant gradient checkpointing, or "
            "torch.no_grad), so it would not be trained; enable gradients, or keep the layer deterministic"
        )


class _PriorOf:
    """Reads a layer's prior when its weight is sampled; a class, since models with lambdas cannot be pickled."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, layer: Any) -> dist.TorchDistribution:
        _check_gradients(layer, self.name)
        return getattr(layer, f"{self.name}_prior")()


@pyro_method
def sample_sites(net: Any, sites: dict[str, tuple[str, str]]) -> None:
    """Sample every site of ``sites``, given by the paths and attributes of their layers, without running the network."""
    for path, name in sites.values():
        getattr(net.get_submodule(path), name)
