"""``count_flops``: the arithmetic of layers with the weights that are not 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_lottery.handlers.local_reparameterization import LAYER_FUNCTIONS

_paused: ContextVar[bool] = ContextVar("paused", default=False)


@contextmanager
def not_counted() -> Iterator[None]:
    """Let ``count_flops`` count nothing of what this package runs within this context for itself."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


class count_flops(TorchFunctionMode):
    """Count the floating-point operations of linear, convolution and attention layers within this context.

    ``total`` is 2 × the weights that are not 0 × the places at which each is used: a multiplication and an addition each.
    Biases, normalisation and the products of activations in attention are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _paused.get():
            return out
        if func in LAYER_FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._add(weight, _places(func, weight, args[0] if args else kwargs["input"], out))
        elif func is F.multi_head_attention_forward:
            named = _named(args, kwargs)
            query, key, value = (named[name].numel() // named[name].shape[-1] for name in ("query", "key", "value"))
            if "in_proj_weight" in named:
                projections = named["in_proj_weight"].chunk(3)
            else:
                projections = tuple(named[f"{name}_proj_weight"] for name in "qkv")
            for weight, places in zip(
                (*projections, named["out_proj_weight"]), (query, key, value, query), strict=True
            ):
                self._add(weight, places)
        return out

    def _add(self, weight: Tensor, places: int) -> None:
        self.total += 2 * int(weight.detach().count_nonzero()) * places


def _places(func: Any, weight: Tensor, x: Tensor, y: Tensor) -> int:
    """The number of places at which a layer uses each of its weights."""
    if func is F.linear:
        return y.numel() // y.shape[-1]
    grid = x if "transpose" in func.__name__ else y  # a transposed convolution uses each weight at every input
    return grid.shape[2 - weight.ndim :].numel() * (len(grid) if grid.ndim == weight.ndim else 1)


def _named(args: Any, kwargs: Any) -> dict[str, Tensor]:
    names = (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
        "add_zero_attn", "dropout_p", "out_proj_weight",
    )  # fmt: skip
    every = dict(zip(names, args, strict=False)) | (kwargs or {})
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}
