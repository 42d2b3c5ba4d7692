"""Where the surviving weights of a layer are, and which inputs each output takes: the tables that sparse.c works from."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyro_lottery.kernels import native

Pair = tuple[int, int]


class Pattern:
    """The places of a convolution's surviving weights, by output channel and by input channel.

    ``mask`` is bool [out, in / groups, h, w], or [out, in] for a linear layer. Values [kept] are in the order of
    :class:`pyro_lottery.kernels.Layout`: by output channel, row and column of the filter, and input channel.
    """

    def __init__(self, mask: Tensor, groups: int = 1):
        mask = mask.reshape(*mask.shape, *(1,) * (4 - mask.ndim))
        self.rows, each, *size = mask.shape
        self.columns, self.size = each * groups, (size[0], size[1])
        out, row, column, channel = mask.permute(0, 2, 3, 1).nonzero().T
        tap, channel = row * size[1] + column, channel + out // max(1, self.rows // groups) * each
        self.kept = len(out)
        self.forward = self._sorted(out, channel, tap, self.rows, self.columns)
        self.backward = self._sorted(channel, out, tap, self.columns, self.rows)

    @property
    def taps(self) -> int:
        """Number of positions in a filter."""
        return self.size[0] * self.size[1]

    def _sorted(
        self, row: Tensor, column: Tensor, tap: Tensor, rows: int, columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(ptr, col, pos) of sparse.c, int32: weights sorted by row, tap and column."""
        group = row * self.taps + tap
        order = (group * columns + column).argsort()
        ptr = torch.zeros(rows * self.taps + 1, dtype=torch.int32)
        ptr[1:] = torch.bincount(group, minlength=rows * self.taps).cumsum(0)
        return ptr, column[order].int(), order.int()


@lru_cache(maxsize=256)
def tiles(out: Pair, into: Pair, size: Pair, n: int, stride: Pair, padding: Pair, dilation: Pair, back: bool) -> Tensor:
    """The tiles of sparse.c, int32 [tiles, 2 + taps], for outputs [*out, n] from inputs [*into, n].

    With ``back``, for the gradient of the input: ``out`` is then the size of the input, and ``into`` that of the output.
    """

    def source(place: int, tap: int, axis: int) -> int:
        if back:
            place, rest = divmod(place + padding[axis] - tap * dilation[axis], stride[axis])
        else:
            place, rest = place * stride[axis] + tap * dilation[axis] - padding[axis], 0
        return place if rest == 0 and 0 <= place < into[axis] else -1

    rows, columns = [[[source(o, k, a) for k in range(size[a])] for o in range(out[a])] for a in (0, 1)]
    pieces: list[
        list[int]
    ] = []  # of one row of outputs: place, length, then the place of the inputs by column of the filter
    start = 0
    while start < out[1]:
        end = start + 1
        while end < out[1] and _goes_on(columns[start], columns[end], end - start):
            end += 1
        at, whole = 0, (end - start) * n
        while at < whole:
            here = _largest(whole - at)
            pieces.append([start * n + at, here, *(c if c < 0 else c * n + at for c in columns[start])])
            at += here
        start = end
    piece, row = torch.tensor(pieces), torch.tensor(rows)
    above, within = row[:, None, :, None], piece[None, :, None, 2:]
    inputs = (above * into[1] * n + within).masked_fill((above < 0) | (within < 0), -1)
    place = torch.arange(out[0])[:, None] * out[1] * n + piece[:, 0]
    length = piece[:, 1].expand(len(row), -1)
    return torch.cat([torch.stack([place, length], 2), inputs.flatten(2)], 2).flatten(0, 1).int().contiguous()


def _goes_on(first: list[int], other: list[int], apart: int) -> bool:
    """Whether the inputs of a column of outputs that is ``apart`` from the first continue those of the first, for every tap."""
    return all((a < 0 and b < 0) or (a >= 0 and b == a + apart) for a, b in zip(first, other, strict=True))


def _largest(length: int) -> int:
    """The length of a tile that sparse.c has code for, or a rest."""
    size = native.number("pl_sparse_most")
    while size > length and size > 8:
        size //= 2
    return min(size, length)
