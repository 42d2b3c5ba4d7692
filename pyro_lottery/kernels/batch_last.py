"""``batch_last``: the memory layout of activations between sparse layers.

The memory of a tensor [n, c, h, w] is then [c, h, w, n], so that each weight multiplies contiguous numbers. That memory, as a
contiguous tensor, is called the planes of the activations: [c, h, w, n].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lottery.kernels import native


def planes(x: Tensor) -> Tensor:
    """Return the planes [c, h, w, n] of activations ``x`` [n, c, h, w], without a copy if x is batch_last."""
    moved = x.permute(1, 2, 3, 0)
    if moved.is_contiguous() or not x.is_contiguous():
        return moved.contiguous()
    return transposed(x.flatten(1)).view(moved.shape)


def activations(planes: Tensor) -> Tensor:
    """Return ``planes`` [c, h, w, n] as activations [n, c, h, w], which are batch_last and share their memory."""
    return planes.permute(3, 0, 1, 2)


def is_batch_last(x: Tensor) -> bool:
    """Return whether the memory of ``x`` [n, c, h, w] is [c, h, w, n] and not also [n, c, h, w]."""
    return x.ndim == 4 and len(x) > 1 and x[0].numel() > 1 and x.permute(1, 2, 3, 0).is_contiguous()


def transposed(matrix: Tensor) -> Tensor:
    """Return the transpose of a contiguous ``matrix`` [a, b], as a contiguous tensor [b, a].

    In C for float32 on the CPU, where ``matrix.t().contiguous()`` took five times as long.
    """
    if native.problem() is not None or matrix.dtype != torch.float32 or matrix.device.type != "cpu":
        return matrix.t().contiguous()
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    native.call("pl_transpose", *matrix.shape, matrix, out)
    return out
