"""Which parameters of a network become random, and which of these may be pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from pyro_lottery.errors import UserError
from pyro_lottery.priors import AnyPrior, Prior, SitePrior, of_sites

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose weights and biases become random; MultiheadAttention is another."""


def random_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """``(site, layer, attribute)`` of every weight and bias that can be random, in the network's order (paper §3).

    These are the parameters of Linear, Conv and MultiheadAttention layers. Normalisation layers, class tokens and
    position embeddings stay deterministic.
    """
    for prefix, layer in net.named_modules():
        if isinstance(layer, (*LAYERS, nn.MultiheadAttention)):
            for name, _ in layer.named_parameters(recurse=False):
                # by name, since subclasses add parameters: the gain of timm's standardised convolutions is a normalisation
                if name.endswith(("weight", "bias")) or name in ("bias_k", "bias_v"):
                    yield (f"{prefix}.{name}" if prefix else name), layer, name


def second_names(net: nn.Module) -> dict[str, str]:
    """Maps each duplicate name in the state dict to the first name of the same tensor, which is the site's.

    A module that is in the network in two places has its tensors in the state dict under two names.
    """
    places: dict[int, str] = {}
    found: dict[str, str] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        first = places.setdefault(id(module), path)
        if first != path:
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            found |= {f"{path}.{name}": f"{first}.{name}" if first else name for name, _ in own}
    return found


def random_sites(net: nn.Module, prior: AnyPrior) -> dict[str, Prior]:
    """The prior of every parameter that becomes random.

    These are the parameters of ``random_parameters``, without those that ``prior`` excludes (None in a dict of globs) and
    those that are frozen (``requires_grad=False``). Raises ``UserError`` if no parameter would be random, if a part of
    the prior applies to frozen parameters only, and for a network that cannot be made Bayesian.
    """
    _check_network(net)
    parameters = {site: getattr(layer, name) for site, layer, name in random_parameters(net)}
    if not parameters:
        raise UserError(
            "the network has no layer that could become Bayesian; it needs a Linear, Conv or MultiheadAttention layer"
        )
    said = of_sites(prior, parameters)
    chosen = {site: own for site, own in said.items() if own is not None and parameters[site].requires_grad}
    for site, own in said.items():
        if own is not None and own not in chosen.values():
            raise UserError(
                f"{site!r} has a prior but is frozen (requires_grad=False), like all parameters with that prior; set "
                "requires_grad=True to make it random, or give it the prior None"
            )
    if not chosen:
        raise UserError("the prior is None for every parameter; give at least one of them a distribution")
    _check_layers(net, prior, chosen)
    _check_dtypes({site: parameters[site].dtype for site in chosen})
    for name, parameter in net.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise UserError(f"{name!r} is {parameter.dtype}, which is not trained here; {AS_REAL}")
    return chosen


def prunable_sites(net: nn.Module) -> tuple[str, ...]:
    """The sites that can be pruned: all weights except those of the final classification layer, and no biases (paper §5)."""
    final = _classifier_layers(net)
    return tuple(site for site, layer, name in random_parameters(net) if "bias" not in name and id(layer) not in final)


def _classifier_layers(net: nn.Module) -> set[int]:
    get = getattr(net, "get_classifier", None)  # timm's convention, which the networks of this package follow
    heads = get() if callable(get) else ()
    heads = heads if isinstance(heads, tuple | list) else (heads,)  # distilled transformers have two
    final = {id(m) for head in heads if isinstance(head, nn.Module) for m in head.modules() if isinstance(m, LAYERS)}
    return final or {id(m) for m in [m for m in net.modules() if isinstance(m, LAYERS)][-1:]}


def outputs_of(net: nn.Module) -> int:
    """The number of outputs, or channels, of the network's last Linear or Conv layer; 0 if there is none."""
    sizes = [
        m.out_features if isinstance(m, nn.Linear) else m.out_channels for m in net.modules() if isinstance(m, LAYERS)
    ]
    return sizes[-1] if sizes else 0


def classifier_parameters(net: nn.Module) -> list[str]:
    """Names of the weights and biases of the final classification layer."""
    final = _classifier_layers(net)
    return [site for site, layer, _ in random_parameters(net) if id(layer) in final]


def kaiming_scale(layer: Any, name: str) -> float:
    """Standard deviation √(2 / fan_in) of Kaiming initialisation (He et al. 2015); a bias uses the fan-in of its layer."""
    return math.sqrt(2.0 / fan_in(layer, name))


def fan_in(layer: Any, name: str) -> int:
    """How many inputs each output of a layer sums by the weight ``name``; a bias has that of its layer."""
    if "bias" in name and isinstance(layer, nn.MultiheadAttention):
        return int(layer.embed_dim)
    weight = layer.weight if "bias" in name else getattr(layer, name)
    if isinstance(layer, _ConvTransposeNd):  # [inputs, outputs / groups, ...]
        return int(weight[:, 0].numel() // layer.groups)
    return int(weight[0].numel())


LARGE_PART = 0.1
"""A note explains densities if more than this share of a network's weights is in layers that cannot be random."""


def what_density_is_of(net: nn.Module, prunable: Iterable[str]) -> str | None:
    """A note if many weights are in layers that cannot be random, such as LSTM, embeddings and conditional convolutions."""
    random = {site for site, _, _ in random_parameters(net)}
    weights = {name: p.numel() for name, p in net.named_parameters() if p.ndim > 1 and p.requires_grad}
    others = {name: count for name, count in weights.items() if name not in random}
    if sum(others.values()) <= LARGE_PART * sum(weights.values()):
        return None
    largest = max(others, key=lambda name: others[name])
    kind = type(net.get_submodule(largest.rpartition(".")[0])).__name__
    share = sum(weights.get(site, 0) for site in prunable) / sum(weights.values())
    return (
        f"densities count only the prunable weights, {share:.1%} of this network's; {largest!r} ({kind}) and "
        f"{len(others) - 1} other parameters are in layers that cannot be random, and stay dense"
    )


def _check_network(net: nn.Module) -> None:
    """Raise ``UserError`` if a network is already Bayesian, compiled, or has layers without a shape."""
    if any(isinstance(module, SitePrior) for module in net.modules()):
        raise UserError("the network is already Bayesian; create a new one, or use the model that it is part of")
    for path, module in net.named_modules():
        if "_orig_mod" in module._modules:  # an OptimizedModule, recognised without its class, which is slow to import
            raise UserError(
                f"{path or 'the network'} is compiled, which does not help when weights are resampled at each step; pass the "
                "original network (its ._orig_mod)"
            )
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(value):
            raise UserError(f"{name!r} has no shape yet (a lazy layer); run the network once on an input first")


AS_REAL = "hold real and imaginary part as one real tensor (torch.view_as_real), and join them in forward (torch.view_as_complex)"
"""What to do with complex numbers."""


def _check_dtypes(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ``UserError`` unless all random parameters are float32, or all are float64."""
    (first, dtype), *others = dtypes.items()
    if dtype.is_complex:
        raise UserError(f"{first!r} is {dtype}, but random weights must be real; {AS_REAL}")
    if dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"{first!r} is {dtype}, which is too imprecise for small scales and their KL; convert the network by net.float(), "
            'and train with precision="bf16" for speed'
        )
    for name, other in others:
        if other != dtype:
            raise UserError(f"{first!r} is {dtype} but {name!r} is {other}; convert the network by net.float()")


def _check_layers(net: nn.Module, prior: AnyPrior, random: Iterable[str]) -> None:
    """Raise ``UserError`` for layers that would be random but do not own their weights."""
    for path, layer in net.named_modules():
        name = f"{path}.weight" if path else "weight"
        for part in (
            getattr(layer, "parametrizations", {}) if isinstance(layer, (*LAYERS, nn.MultiheadAttention)) else ()
        ):
            if not _left_out(prior, other := f"{path}.{part}" if path else part):
                raise UserError(f"{other!r} is not a parameter (a parametrization); remove it first")
        if isinstance(layer, LAYERS) and "weight" not in layer._parameters and not _left_out(prior, name):
            raise UserError(
                f"{name!r} is not a parameter (weight_norm, spectral_norm or pruning?); remove the reparametrization first"
            )
    random, owners = set(random), dict[int, str]()
    for path, layer in net.named_modules():
        for attribute, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            other = owners.setdefault(id(parameter), name)
            if other != name and {other, name} & random:
                raise UserError(
                    f"{other!r} and {name!r} are one tied parameter; give each layer a parameter of its own"
                )


def _left_out(prior: AnyPrior, name: str) -> bool:
    return isinstance(prior, Mapping) and next((prior[glob] for glob in prior if fnmatchcase(name, glob)), 0) is None
