"""Batch normalisation of ``batch_last`` activations in C, for float32 on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from pyro_lottery.kernels import native
from pyro_lottery.kernels.batch_last import activations, empty, planes
from pyro_lottery.kernels.once import once_only


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``x`` [n, c, h, w] by the mean and variance of each channel, as ``F.batch_norm`` does in training.

    Returns y, which is batch_last, and the mean and biased variance [c], which have no gradient. ``weight`` and ``bias`` are
    [c].
    """
    return _BatchNorm.apply(x, weight, bias, epsilon)  # type: ignore[no-untyped-call]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, ...]:
        shape, x = x.shape, planes(x.detach())
        channels, count = len(x), x[0].numel()
        y = empty(x, *shape)
        statistics = x.new_empty(3, channels)
        mean, variance, rate = statistics
        scale, shift = (None if t is None else t.detach().contiguous() for t in (weight, bias))
        native.call(
            "pl_norm", channels, count, x, planes(y), scale, shift, ctypes.c_double(epsilon), mean, variance, rate
        )
        ctx.save_for_backward(x, scale, mean, rate)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, scale, mean, rate = ctx.saved_tensors
        of_x, of_both = torch.empty_like(x), x.new_empty(2, len(x))
        native.call("pl_norm_grad", len(x), x[0].numel(), planes(grad), x, of_x, scale, mean, rate, *of_both)
        of_weight, of_bias = (
            t if needed else None for t, needed in zip(of_both, ctx.needs_input_grad[1:3], strict=True)
        )
        return activations(of_x), of_weight, of_bias, None
