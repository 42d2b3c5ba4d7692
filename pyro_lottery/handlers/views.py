"""``AnyViews``: lets a network take views of activations whose layout in memory allows none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

REFUSED = "view size is not compatible with input tensor's size and stride"
"""What torch says of a view that the layout does not allow."""


def view(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``input.view``, of a copy where the layout of ``input`` allows no view."""
    try:
        return torch.Tensor.view(input, *args, **kwargs)
    except RuntimeError:
        return torch.Tensor.view(input.contiguous(), *args, **kwargs)


def view_as(input: Tensor, other: Tensor) -> Tensor:
    """``input.view_as``, of a copy where the layout of ``input`` allows no view."""
    return view(input, other.shape)


class AnyViews(TorchFunctionMode):
    """Within this context ``x.view(len(x), -1)`` works in every layout of ``x``, such as channels-last, in which this package computes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


_FUNCTIONS: dict[Any, Any] = {Tensor.view: view, Tensor.view_as: view_as}
