"""Calls a network and checks that its output is one tensor with one row per example."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lottery import trees
from pyro_lottery.errors import UserError
from pyro_lottery.handlers.views import REFUSED, AnyViews

_VIEWS = "_takes_views"
"""Attribute of a network that is called under ``AnyViews``."""


def call(net: nn.Module, x: Any, dtype: torch.dtype) -> Tensor:
    """The output [n, ...] of ``net``, whose weights have ``dtype``, for a batch of n examples.

    Calls ``net(*x)`` for a tuple or list of tensors, and ``net(**x)`` for a mapping. A network that changes its input in place gets copies, since
    the next draw of the weights needs the input as it was. A network that views activations, such as ``x.view(len(x), -1)``, gets copies where their
    layout, which is this package's choice, allows no view. Raises ``UserError`` if the output is not one tensor with n examples.
    """
    given, x, mode = x, in_dtype(x, dtype), net.training
    changes = vars(net).setdefault("_changes_input", {})  # by mode, since a network may do so in training alone
    copied = changes.get(mode, True)
    x = trees.map_tensors(torch.clone, x) if copied else x
    before = _versions(x)
    count = trees.count(x)
    try:
        with AnyViews() if vars(net).get(_VIEWS) else nullcontext():
            if isinstance(x, Mapping):
                output = one_tensor(net(**x))
            else:
                output = one_tensor(net(*x) if isinstance(x, tuple | list) else net(x))
    except RuntimeError as error:
        if REFUSED not in str(error) or vars(net).get(_VIEWS):
            raise
        vars(net)[_VIEWS] = True
        return call(net, given, dtype)
    changed = _versions(x) != before
    if changed and not copied:
        changes[mode] = True
        raise UserError(
            "the network changes its input in place for this batch, and did not for the first one, so the input is spoilt; write x = x - 1 for x -= 1"
        )
    if before and mode not in changes:
        changes[mode] = changed
    if output.shape[:1] != (count,):  # otherwise unnoticed until slices are joined, if at all
        raise UserError(
            f"the network returned shape {tuple(output.shape)} for {count} example{'s' * (count != 1)}, but the first "
            "dimension must be the examples; does it reshape, or squeeze() without a dimension?"
        )
    return output


def _versions(x: Any) -> list[int]:
    """How often each tensor has been changed in place; empty in inference mode, where torch does not count."""
    return [t._version for t in trees.tensors(x) if not t.is_inference()]


def in_dtype(x: Any, dtype: torch.dtype) -> Any:
    """A batch for weights of ``dtype``, since images are float32, and numpy arrays often float64."""
    return trees.map_tensors(
        lambda t: t.to(dtype) if t.is_floating_point() and torch.float64 in (t.dtype, dtype) else t, x
    )


def one_tensor(output: Any) -> Tensor:
    """A network's output, converted to float32 unless it is float64; raises ``UserError`` if it is not a tensor."""
    if not isinstance(output, Tensor):
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
        inside = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
        raise UserError(
            f"the network returned a {type(output).__name__}{f' of {inside}' if inside else ''}; it must return one tensor "
            "(set aux_logits=False, or wrap the network in a module that returns only its logits)"
        )
    return output if output.dtype == torch.float64 else output.float()
