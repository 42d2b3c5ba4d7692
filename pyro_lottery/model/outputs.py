"""Calls a network and checks that its output is one tensor with one row per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lottery import trees
from pyro_lottery.errors import UserError
from pyro_lottery.handlers.layout import UsualLayout
from pyro_lottery.handlers.sparse_layers import are_sparse

_USUAL = "_usual_layout"
"""Attribute of a network: by training mode and sparse layers, whether it needs torch's usual layout."""


def call(net: nn.Module, x: Any, dtype: torch.dtype) -> Tensor:
    """The output [n, ...] of ``net``, whose weights have ``dtype``, for a batch of n examples.

    Calls ``net(*x)`` for a tuple or list of tensors, and ``net(**x)`` for a mapping. A network that changes its input in place gets copies, since
    the next draw of the weights needs the input as it was. Raises ``UserError`` if the output is not one tensor with n examples.
    """
    x, mode = in_dtype(x, dtype), net.training
    changes = vars(net).setdefault("_changes_input", {})  # by mode, since a network may do so in training alone
    copied = changes.get(mode, True)
    x = trees.map_tensors(torch.clone, x) if copied else x
    before = _versions(x)
    count = trees.count(x)
    output = one_tensor(run(net, x))
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


def run(net: nn.Module, x: Any) -> Any:
    """What ``net`` returns for a batch ``x``, in channels-last or, where its code does not take that, in torch's usual layout.

    The first call finds out which, for training and evaluation mode each, and for sparse layers, which allow more.
    """
    usual, mode = vars(net).setdefault(_USUAL, {}), (net.training, are_sparse())
    if mode in usual:
        return _run(net, x, usual[mode])
    kept, restore = trees.map_tensors(torch.clone, x), _restorer(net)
    try:
        found, usual[mode] = _run(net, x, False), False
        return found
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = error.with_traceback(None)  # whose frames hold the activations of this pass
    restore()
    try:
        found, usual[mode] = _run(net, kept, True), True
        return found
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it was not the layout
        raise first from None


def _run(net: nn.Module, x: Any, usual: bool) -> Any:
    with UsualLayout() if usual else nullcontext():
        x = trees.map_tensors(torch.Tensor.contiguous, x) if usual else x
        if isinstance(x, Mapping):
            return net(**x)
        return net(*x) if isinstance(x, tuple | list) else net(x)


def _restorer(net: nn.Module) -> Callable[[], None]:
    """A function that sets back what a call changes in training mode: buffers, such as BatchNorm's statistics, and random states."""
    if not net.training:
        return lambda: None
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not name.endswith("_init")
    ]
    states, on_gpu = torch.get_rng_state(), torch.cuda.is_available() and torch.cuda.is_initialized()
    of_gpu = torch.cuda.get_rng_state_all() if on_gpu else []

    def restore() -> None:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                # Compared by value, since torch does not count BatchNorm's changes; a copy of the same would count as one.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(states)
        if of_gpu:
            torch.cuda.set_rng_state_all(of_gpu)

    return restore


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
