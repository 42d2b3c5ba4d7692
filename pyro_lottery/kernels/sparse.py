"""Convolutions and linear layers whose cost is proportional to the surviving weights, in C for float32 on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lottery.kernels import native
from pyro_lottery.kernels.batch_last import activations, empty, planes, turned
from pyro_lottery.kernels.once import once_only
from pyro_lottery.kernels.pattern import Pair, Pattern, Places, Tiles, tiles

CACHE = 24 * 1024
"""Bytes of inputs that stay in the first cache while all rows pass."""
LEAST = 3200
"""Multiplications for one row that are worth loading and storing the sums of a tile."""


@dataclass(frozen=True)
class Layer:
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

    def _tables(self, back: bool) -> tuple[Tiles, Places]:
        pattern, ends = self.pattern, (self.into, self.out) if back else (self.out, self.into)
        table = tiles(*ends, pattern.size, self.n, self.stride, self.padding, self.dilation, back)
        inputs = (
            table.largest + (pattern.size[1] - 1) * self.dilation[1] * self.n
        )  # from one row of a channel to one tile
        fits = CACHE // (4 * min(table.plane, pattern.size[0] * inputs))
        dense = pattern.rows * pattern.columns * math.prod(pattern.size)
        pays = math.ceil(LEAST * dense / (max(1, pattern.kept) * max(1, table.work)))
        channels = pattern.rows if back else pattern.columns
        return table, pattern.places(table, max(1, min(channels, max(fits, pays))), back)

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs [n, out, h, w], batch_last, from the planes ``x`` of the inputs, the weights [kept] and the bias [out]."""
        y = empty(x, self.n, self.pattern.rows, *self.out)
        self._apply(x, planes(y), values, bias, False)
        return y

    def of_draws(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """As :meth:`forward` for planes that hold ``draws.at_once()`` draws at each place: [c, h, w, images · draws].

        ``values`` is [kept, draws] in the order of the pattern's places for these tables, and ``bias`` [out, draws].
        """
        table, places = self._tables(False)
        y = empty(x, self.n, self.pattern.rows, *self.out)
        self._call("pl_sparse_draws", x, planes(y), values, bias, table, places)
        return y

    @property
    def places(self) -> Places:
        """The pattern's places for outputs."""
        return self._tables(False)[1]

    def of_input(self, g: Tensor, values: Tensor) -> Tensor:
        """The gradient of the inputs [in, h, w, n], given that of the outputs, ``g`` [out, h, w, n]."""
        of_x = g.new_empty(self.pattern.columns, *self.into, self.n)
        self._apply(g, of_x, values, None, True)
        return of_x

    def of_values(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the weights [kept], given the inputs ``x`` and the gradient ``g`` of the outputs."""
        (table, places), threads = self._tables(False), torch.get_num_threads()
        rows, blocks, _ = places.sizes
        some = max(1, min(32, rows * blocks // (4 * threads)))  # rows of one task
        found, most = g.new_empty(self.pattern.kept), places.most(some)
        scratch = g.new_empty(threads * most * native.number("pl_sparse_vector"))
        native.call(
            "pl_sparse_grad", x, g, *places.sizes, places.ptr, places.off, places.pos, found, scratch, most,
            *table.table.shape, table.table, g[0].numel(), some, threads,
        )  # fmt: skip
        return found

    def _apply(self, x: Tensor, y: Tensor, values: Tensor, bias: Tensor | None, back: bool) -> None:
        table, places = self._tables(back)
        self._call("pl_sparse_forward", x, y, values.index_select(0, places.pos), bias, table, places)

    @staticmethod
    def _call(
        name: str, x: Tensor, y: Tensor, values: Tensor, bias: Tensor | None, table: Tiles, places: Places
    ) -> None:
        some = min(64, len(y))  # rows of one task
        parts = -(-4 * torch.get_num_threads() // -(-len(y) // some))
        native.call(
            name, x, y, *places.sizes, places.ptr, places.off, values, bias, *table.table.shape, table.table, y[0].numel(), some,
            -(-len(table.table) // parts),
        )  # fmt: skip


def convolution(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The convolution of ``x`` [n, c, h, w] with the weights of ``pattern``, whose values are [kept]; the result is batch_last.

    Its gradients are those of x, of the values and of the bias. All tensors are float32 on the CPU.
    """
    layer = Layer(pattern, (x.shape[2], x.shape[3]), len(x), stride, padding, dilation)
    return _Convolution.apply(x, values, bias, layer)  # type: ignore[no-untyped-call,no-any-return]


def linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """The linear layer of ``x`` [n, in] with the weights of ``pattern``, whose values are [kept]; the result is [n, out].

    Its gradients are those of x, of the values and of the bias. All tensors are float32 on the CPU.
    """
    return _Linear.apply(x, values, bias, Layer(pattern, (1, 1), len(x)))  # type: ignore[no-untyped-call,no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
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
