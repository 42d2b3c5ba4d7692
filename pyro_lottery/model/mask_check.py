"""Checks that pruned weights are zero in the tensors with which the network's layers compute."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import MutableMapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_lottery import seeds, trees
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import active_mask, sparsify
from pyro_lottery.handlers.used_weights import Use, UsedWeights
from pyro_lottery.machine import channels_last
from pyro_lottery.masks import zeroed
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.modes import inference
from pyro_lottery.types import Mask, Sites

_KEPT = 1 / 8
"""Share of the surviving weights that the check keeps, so that layers which use a part of a weight are found too."""

_checked: MutableMapping[BayesianNetwork, frozenset[str]] = weakref.WeakKeyDictionary()
"""The sites of each network that :func:`check_once` has found to stay 0 where they are pruned."""


def used_weights(model: BayesianNetwork, values: Sites, x: Any) -> Sequence[Use]:
    """Every weight that a linear or convolution function gets in one forward pass, made from ``values`` of the sites.

    Runs in eval mode, under the enclosing ``sparsify``; ``x`` is a batch as the network takes it.
    """
    values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    inputs: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        inputs.append(value.clone().requires_grad_())
        return channels_last(inputs[-1] * 1)  # times 1, because a leaf cannot be changed in place

    x = trees.map_tensors(leaf, x)
    # A compiled network runs eagerly, because what is recorded is read at once.
    eager: Any = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with (
        eager,
        inference(model),
        torch.enable_grad(),
        UsedWeights(values, inputs) as used,
        poutine.condition(data=values),
    ):
        model.outputs(x)
    return used.uses


def warn_of_last_layer(model: BayesianNetwork, x: Any) -> None:
    """Warn if the layer that the network uses last for a batch ``x`` is not the one that is spared as its final one.

    Without ``get_classifier`` that is the layer that was registered last.
    """
    if callable(getattr(model.net, "get_classifier", None)):
        return
    uses = used_weights(model, model.initial_values(), x)
    last = [site for site in uses[-1].sites if site in model.prunable] if uses else []
    if last:
        warnings.warn(
            f"{last[0]!r} is used last and can be pruned: the final layer, which is spared, is the one that the network defines last; give the network a "
            "method get_classifier() that returns its final layer",
            stacklevel=2,
        )


def check_used_weights(model: BayesianNetwork, x: Any) -> bool:
    """Raise ``UserError`` where a layer computes with pruned weights that are not 0 under the enclosing ``sparsify``.

    This happens where something transforms a weight before its layer uses it; the message names the layer. Returns whether
    anything was run: without a pruned weight nothing is.

    One forward pass with some values: every pruned weight must leave a zero in what a layer function gets.
    """
    kept = _masks(model)
    if all(bool(mask.all()) for mask in kept.values()):
        return False
    values, probe = _probe(model, kept)
    with sparsify(probe):
        uses = used_weights(model, values, x)
    survivors = {name: int(value.count_nonzero()) for name, value in values.items()}
    for use in uses:
        elements = sum(values[name].numel() for name in use.sites)
        allowed = sum(survivors[name] for name in use.sites) * max(1.0, use.elements / elements)
        if use.nonzero > allowed:
            raise UserError(
                f"{use.sites[0]!r} is transformed before its layer uses it, so pruned weights do not stay 0: the layer computes "
                f"with {use.nonzero:,} of {use.elements:,} weights, but {int(allowed):,} survive; give it no mask, or train the "
                "network dense"
            )
    return True


def check_once(model: BayesianNetwork, x: Any) -> None:
    """:func:`check_used_weights` with two examples of ``x``, once for a model and the sites that are masked.

    Random numbers go on as if nothing had run. What the network cannot take is left for the prediction itself to say.
    """
    masked = frozenset(_masks(model))
    if masked <= _checked.get(model, frozenset()):
        return
    with suppress(RuntimeError), seeds.rng(trees.first_tensor(x).device, 0, "masks"):
        if check_used_weights(model, trees.map_tensors(lambda t: t[:2], x)):
            _checked[model] = masked | _checked.get(model, frozenset())


def _masks(model: BayesianNetwork) -> Mask:
    """The masks of the enclosing ``sparsify`` for the sites of ``model``."""
    found = {name: active_mask(name, value.shape, value.device) for name, value in model.initial_values().items()}
    return {name: mask for name, mask in found.items() if mask is not None}


def _probe(model: BayesianNetwork, kept: Mask) -> tuple[Sites, Mask]:
    """Values of all sites that are not 0 but where they are pruned, and masks of a share of the survivors."""
    generator = torch.Generator().manual_seed(0)
    values, masks = {}, {}
    for name, initial in model.initial_values().items():
        value = torch.randn(initial.shape, generator=generator) * model.kaiming_scale[name]
        values[name] = torch.where(value == 0, 1.0, value).to(initial)
        if name in kept:
            some = torch.rand(initial.shape, generator=generator) < _KEPT
            masks[name] = kept[name] & some.to(initial.device)
            if not bool(masks[name].any()) and bool(kept[name].any()):  # a layer without weights would show nothing
                masks[name].view(-1)[kept[name].reshape(-1).nonzero()[0]] = True
            values[name] = zeroed(values[name], masks[name])
    return values, masks
