"""``UsualLayout``: keeps activations in torch's own layout, for networks whose code relies on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_lottery.handlers.local_reparameterization import LAYER_FUNCTIONS


def view(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``input.view``, of a copy where the layout of ``input`` allows no view."""
    try:
        return torch.Tensor.view(input, *args, **kwargs)
    except RuntimeError:
        return torch.Tensor.view(input.contiguous(), *args, **kwargs)


def view_as(input: Tensor, other: Tensor) -> Tensor:
    """``input.view_as``, of a copy where the layout of ``input`` allows no view."""
    return view(input, other.shape)


class UsualLayout(TorchFunctionMode):
    """Within this context layers return contiguous activations, although this package's weights and inputs are channels-last.

    So ``x.view(len(x), -1)`` is a view, and writing to it changes ``x``, as the network's author expects. Only weights, which
    are drawn and need no writing, may be copied for a view.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _VIEWS.get(func, func)(*args, **(kwargs or {}))
        return out.contiguous() if func in LAYER_FUNCTIONS else out


_VIEWS: dict[Any, Any] = {Tensor.view: view, Tensor.view_as: view_as}
