"""Checks that pruned weights are zero in the tensors with which the network's layers compute."""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_lottery import seeds, trees
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import active_mask, sparsify
from pyro_lottery.handlers.flops import not_counted
from pyro_lottery.handlers.used_weights import Use, UsedWeights
from pyro_lottery.machine import channels_last
from pyro_lottery.masks import zeroed
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.modes import inference
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Sites

_KEPT = 1 / 8
"""Share of the surviving weights that the check keeps, so that layers which use a part of a weight are found too."""

_checked: MutableMapping[BayesianNetwork, frozenset[str]] = weakref.WeakKeyDictionary()
"""The sites of each network that :func:`warn_of_used_weights` has checked."""


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
        inference(model),
        eager,
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


def check_used_weights(model: BayesianNetwork, x: Any) -> None:
    """Raise ``UserError`` where a layer computes with pruned weights that are not 0 under the enclosing ``sparsify``.

    This happens where something transforms a weight before its layer uses it; the message names the layer. Without a pruned
    weight nothing is run.
    """
    if said := _transformed(model, x):
        raise UserError(said)


def warn_of_used_weights(model: BayesianNetwork, x: Any) -> None:
    """Warn where :func:`check_used_weights` would raise, once for a model and the sites that are pruned.

    A copy of the network gets two examples of ``x``, so that nothing of the prediction that follows changes. A network that
    cannot be run so is not checked.
    """
    masked = {name for name, value in model.initial_values().items() if active_mask(name, value.shape) is not None}
    if masked <= _checked.get(model, frozenset()):
        return  # which spares a GPU from being asked what the masks hold
    partly = {name for name, mask in _pruning(model).items() if bool(mask.any())}  # others cannot show a transformation
    if partly <= _checked.get(model, frozenset()):
        return
    with (
        TURN, not_counted(), torch.inference_mode(False), torch.enable_grad(), seeds.rng(trees.first_tensor(x).device, 0, "masks"),
    ):  # fmt: skip
        try:
            with warnings.catch_warnings(action="ignore"):
                said = _transformed(copy.deepcopy(model), trees.map_tensors(lambda t: t[:2], x))
        except Exception:  # the prediction itself says what the network cannot take
            return
    _checked[model] = _checked.get(model, frozenset()) | partly
    if said:
        warnings.warn(said, stacklevel=2)


def _transformed(model: BayesianNetwork, x: Any) -> str:
    """What is wrong where a layer computes with pruned weights that are not 0; empty if none does.

    One forward pass with some values: every pruned weight must leave a zero in what a layer function gets.
    """
    kept = _pruning(model)
    if not kept:
        return ""
    values, probe = _probe(model, kept)
    with TURN, poutine.block(), sparsify(probe):  # enclosing handlers, such as a trace, do not see this pass
        uses = used_weights(model, values, x)
        for name, value in values.items():
            active_mask(name, value.shape)  # of a layer, too, that this pass does not use, such as an auxiliary head
    survivors = {name: int(value.count_nonzero()) for name, value in values.items()}
    for use in uses:
        elements = sum(values[name].numel() for name in use.sites)
        allowed = sum(survivors[name] for name in use.sites) * max(1.0, use.elements / elements)
        if use.nonzero > allowed:
            return (
                f"{use.sites[0]!r} is transformed before its layer uses it, so pruned weights do not stay 0: the layer computes "
                f"with {use.nonzero:,} of {use.elements:,} weights, but {int(allowed):,} survive; give it no mask, or train the "
                "network dense"
            )
    return ""


def _pruning(model: BayesianNetwork) -> Mask:
    """The masks of the enclosing ``sparsify`` for the sites of ``model`` that lose a weight."""
    found = {name: active_mask(name, value.shape, value.device) for name, value in model.initial_values().items()}
    return {name: mask for name, mask in found.items() if mask is not None and not bool(mask.all())}


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
