"""``batch_last``: the memory layout of activations between sparse layers.

The memory of a tensor [n, c, h, w] is then [c, h, w, n], so that each weight multiplies contiguous numbers. That memory, as a
contiguous tensor, is called the planes of the activations: [c, h, w, n]. Dense layers work on channels_last, [n, h, w, c].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_lottery.kernels import native
from pyro_lottery.kernels.once import once_only


def planes(x: Tensor) -> Tensor:
    """Return the planes [c, h, w, n] of activations ``x`` [n, c, h, w], without a copy if x is batch_last."""
    moved = x.permute(1, 2, 3, 0)
    return moved if moved.is_contiguous() else _copy(x, True).permute(1, 2, 3, 0)


def activations(planes: Tensor) -> Tensor:
    """Return ``planes`` [c, h, w, n] as activations [n, c, h, w], which are batch_last and share their memory."""
    return planes.permute(3, 0, 1, 2)


def empty(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """Return activations [n, c, h, w] in batch_last, not yet set, with the type and device of ``like``.

    They are no view of their planes: torch forbids to change a view in place that an autograd function returned, as ReLUs do.
    """
    return like.new_empty_strided((n, c, h, w), (1, h * w * n, w * n, n))


def is_batch_last(x: Tensor) -> bool:
    """Return whether the memory of ``x`` [n, c, h, w] is [c, h, w, n] and not also [n, c, h, w]."""
    return (
        x.layout == torch.strided
        and x.ndim == 4
        and len(x) > 1
        and x[0].numel() > 1
        and x.permute(1, 2, 3, 0).is_contiguous()
    )


def in_batch_last(x: Tensor) -> Tensor:
    """Return ``x`` [n, c, h, w] in batch_last; its gradient comes back in channels_last."""
    return x if x.permute(1, 2, 3, 0).is_contiguous() else _InLayout.apply(x, True)  # type: ignore[no-untyped-call,no-any-return]


def in_channels_last(x: Tensor) -> Tensor:
    """Return batch_last ``x`` [n, c, h, w] in channels_last, and any other as it is; its gradient comes back in batch_last."""
    return _InLayout.apply(x, False) if is_batch_last(x) else x  # type: ignore[no-untyped-call,no-any-return]


class _InLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch_last: bool) -> Tensor:
        ctx.back = not batch_last
        return _copy(x.detach(), batch_last)

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _copy(grad, ctx.back), None


def _copy(x: Tensor, batch_last: bool) -> Tensor:
    """A copy of ``x`` [n, c, h, w] in batch_last or channels_last."""
    if not batch_last:
        y = torch.empty_like(x, memory_format=torch.channels_last)
        memory = y.permute(0, 2, 3, 1)  # [n, h, w, c]
        if is_batch_last(x):
            turn(x.permute(1, 2, 3, 0).flatten(1, 2), memory.flatten(1, 2))
            return y
        return y.copy_(x)
    y = empty(x, *x.shape)
    memory = y.permute(1, 2, 3, 0)  # [c, h, w, n]
    if x.is_contiguous():
        turn(x.flatten(1), memory.flatten(0, 2))
    elif x.is_contiguous(memory_format=torch.channels_last):
        turn(x.permute(0, 2, 3, 1).flatten(1, 2), memory.flatten(1, 2))
    else:
        memory.copy_(x.permute(1, 2, 3, 0))
    return y


def turned(matrix: Tensor) -> Tensor:
    """Return the transpose of a contiguous ``matrix`` [a, b], as a contiguous tensor [b, a]."""
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    turn(matrix, out)
    return out


def turn(block: Tensor, out: Tensor) -> None:
    """Set ``out`` [b, m, a] to ``block`` [a, m, b] with its ends exchanged, or [b, a] to [a, b]; both are contiguous.

    In C for float32 on the CPU, where torch's copy of three dimensions takes 3 to 4 times as long on one thread of an AMD EPYC.
    """
    if native.problem() is not None or block.dtype != torch.float32 or block.device.type != "cpu":
        out.copy_(block.transpose(0, -1))
        return
    rows, *middle, columns = block.shape
    native.call("pl_turn", rows, middle[0] if middle else 1, columns, block, out)
