"""Convolutions and linear layers whose cost is proportional to the surviving weights, in C for float32 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lottery.kernels import native
from pyro_lottery.kernels.batch_last import activations, empty, planes, turned
from pyro_lottery.kernels.once import once_only
from pyro_lottery.kernels.pattern import Pair, Pattern, tiles


@dataclass(frozen=True)
class _Layer:
    """A pattern with the sizes and the geometry of one layer, for ``n`` examples."""

    pattern: Pattern
    into: Pair
    n: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def out(self) -> Pair:
        """Height and width of the outputs."""
        reach = [self.dilation[a] * (self.pattern.size[a] - 1) + 1 for a in (0, 1)]
        rows, columns = ((self.into[a] + 2 * self.padding[a] - reach[a]) // self.stride[a] + 1 for a in (0, 1))
        return rows, columns

    def _tiles(self, back: bool) -> Tensor:
        ends = (self.into, self.out) if back else (self.out, self.into)
        return tiles(*ends, self.pattern.size, self.n, self.stride, self.padding, self.dilation, back)

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs [n, out, h, w], batch_last, from the planes ``x`` of the inputs, the weights [kept] and the bias [out]."""
        y = empty(x, self.n, self.pattern.rows, *self.out)
        self._apply(x, planes(y), self.pattern.forward, values, bias, self._tiles(False))
        return y

    def of_input(self, g: Tensor, values: Tensor) -> Tensor:
        """The gradient of the inputs [in, h, w, n], given that of the outputs, ``g`` [out, h, w, n]."""
        of_x = g.new_empty(self.pattern.columns, *self.into, self.n)
        self._apply(g, of_x, self.pattern.backward, values, None, self._tiles(True))
        return of_x

    def of_values(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the weights [kept], given the inputs ``x`` and the gradient ``g`` of the outputs."""
        pattern, table, (ptr, col, _) = self.pattern, self._tiles(False), self.pattern.forward
        found, scratch = g.new_empty(pattern.kept), g.new_empty(pattern.kept * native.number("pl_sparse_vector"))
        native.call(
            "pl_sparse_grad", x, g, pattern.rows, pattern.taps, ptr, col, found, scratch, len(table), table, x[0].numel(),
            g[0].numel(), _block(pattern.rows),
        )  # fmt: skip
        return found

    def _apply(self, x: Tensor, y: Tensor, places: Any, values: Tensor, bias: Tensor | None, table: Tensor) -> None:
        native.call(
            "pl_sparse_forward", x, y, len(y), self.pattern.taps, *places, values, bias, len(table), table, x[0].numel(),
            y[0].numel(), _block(len(y)),
        )  # fmt: skip


def _block(rows: int) -> int:
    """Rows of one task: enough tasks for all threads, and enough rows that inputs are read again while they are in the cache."""
    return max(1, min(64, rows // (4 * torch.get_num_threads())))


def convolution(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The convolution of ``x`` [n, c, h, w] with the weights of ``pattern``, whose values are [kept]; the result is batch_last.

    Its gradients are those of x, of the values and of the bias. All tensors are float32 on the CPU.
    """
    layer = _Layer(pattern, (x.shape[2], x.shape[3]), len(x), stride, padding, dilation)
    return _Convolution.apply(x, values, bias, layer)  # type: ignore[no-untyped-call,no-any-return]


def linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """The linear layer of ``x`` [n, in] with the weights of ``pattern``, whose values are [kept]; the result is [n, out].

    Its gradients are those of x, of the values and of the bias. All tensors are float32 on the CPU.
    """
    return _Linear.apply(x, values, bias, _Layer(pattern, (1, 1), len(x)))  # type: ignore[no-untyped-call,no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        x, values, bias = planes(x.detach()), values.detach().contiguous(), _detached(bias)
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return layer.forward(x, values, bias)

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_values, of_bias = _gradients(ctx, planes(grad))
        return None if of_x is None else activations(of_x), of_values, of_bias, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        x, values, bias = (
            turned(x.detach().contiguous())[:, None, None],
            values.detach().contiguous(),
            _detached(bias),
        )
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return turned(planes(layer.forward(x, values, bias)).flatten(1))

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_values, of_bias = _gradients(ctx, turned(grad.contiguous())[:, None, None])
        return None if of_x is None else turned(of_x.flatten(1)), of_values, of_bias, None


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (x, values), layer, (input_needed, values_needed, bias_needed, _) = (
        ctx.saved_tensors,
        ctx.layer,
        ctx.needs_input_grad,
    )
    return (
        layer.of_input(g, values) if input_needed else None,
        layer.of_values(x, g) if values_needed else None,
        g.flatten(1).sum(1) if bias_needed else None,
    )
