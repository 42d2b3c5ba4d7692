"""Backward passes in C, which cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pyro_lottery.errors import UserError


def once_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``backward`` raise ``UserError`` where its own derivative is wanted.

    With torch's ``once_differentiable``, ``torch.autograd.functional.hessian`` returns zeros instead.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # in a backward pass, with create_graph=True alone
            raise UserError(
                "sparse layers have no second derivatives; use --sparse off, or sparse_layers('off') in Python"
            )
        return backward(ctx, *grads)

    return checked
