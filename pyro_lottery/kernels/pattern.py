"""Where the surviving weights of a layer are, and which inputs each output takes: the tables that sparse.c works from."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_lottery.kernels import native

Pair = tuple[int, int]
MOST = 12
"""Most tables that a pattern keeps: one for each direction, size of inputs and number of examples."""


class Pattern:
    """The places of a convolution's surviving weights.

    ``mask`` is bool [out, in / groups, h, w], or [out, in] for a linear layer. Values [kept] are in the order of
    :class:`pyro_lottery.kernels.Layout`: by output channel, row and column of the filter, and input channel.
    """

    def __init__(self, mask: Tensor, groups: int = 1):
        mask = mask.reshape(*mask.shape, *(1,) * (4 - mask.ndim))
        self.rows, each, *size = mask.shape
        self.columns, self.size = each * groups, (size[0], size[1])
        out, row, column, channel = mask.permute(0, 2, 3, 1).nonzero().T
        self._weights = out, channel + out // max(1, self.rows // groups) * each, row * size[1] + column
        self.kept = len(out)
        self._places: dict[tuple[Tiles, int, bool], Places] = {}

    def places(self, tiles: Tiles, width: int, back: bool) -> Places:
        """The weights by output channel, or by input channel with ``back``, and by blocks of ``width`` of the other channels."""
        if (tiles, width, back) not in self._places:
            if len(self._places) == MOST:  # of a network whose inputs have many sizes
                self._places.clear()
            out, channel, tap = self._weights
            ends = (channel, out, self.columns, self.rows) if back else (out, channel, self.rows, self.columns)
            self._places[tiles, width, back] = Places(*ends, tap, width, tiles)
        return self._places[tiles, width, back]


class Places:
    """The weights of a pattern as sparse.c goes over them: by ``row``, by block of ``width`` channels, and by tap."""

    def __init__(self, row: Tensor, channel: Tensor, rows: int, channels: int, tap: Tensor, width: int, tiles: Tiles):
        taps, blocks = len(tiles.shift), -(-channels // width)
        group = (row * blocks + channel // width) * taps + tap
        order = (group * channels + channel).argsort()
        ptr = torch.zeros(rows * blocks * taps + 1, dtype=torch.int32)
        ptr[1:] = torch.bincount(group, minlength=len(ptr) - 1).cumsum(0)
        off = channel * tiles.plane + torch.tensor(tiles.shift)[tap]
        self.sizes = rows, blocks, taps
        self.ptr = ptr
        """Where each row, block and tap begins, int32 [rows * blocks * taps + 1]."""
        self.off = off[order].int()
        """Where the inputs of each weight lie from the base of a tile, int32 [kept]."""
        self.pos = order
        """The place of each weight among the values, int64 [kept]."""
        self._most: dict[int, int] = {}

    def most(self, some: int) -> int:
        """The most weights in one block of ``some`` rows and one block of channels."""
        if some not in self._most:
            rows, blocks, taps = self.sizes
            each = self.ptr[::taps].diff().view(rows, blocks)
            self._most[some] = max(int(part.sum(0).max()) for part in each.split(some))
        return self._most[some]


class Tiles:
    """The tiles of sparse.c for the outputs of one geometry."""

    def __init__(self, place: Tensor, length: Tensor, source: Tensor, shift: list[int], plane: int):
        """``source`` [tiles, taps] is where the inputs of each tap begin, or -1 for padding: base + ``shift``."""
        self.shift, self.plane = shift, plane
        valid = source >= 0
        base = (source - torch.tensor(shift)).gather(1, valid.byte().argmax(1, keepdim=True))[:, 0]
        edge = F.pad(valid, (1, 1)).int().diff(dim=1)  # 1 where a run begins, -1 where it ends
        taps = torch.arange(len(shift) + 1).where(edge != 0, len(shift) + 1).sort(1).values
        self.table = torch.cat([torch.stack([place, length, base, (edge > 0).sum(1)], 1), taps], 1).int().contiguous()
        """int32 [tiles, 4 + taps + 1]; :attr:`largest` is the length of the longest tile."""
        self.largest = int(length.max())
        self.work = float((valid.sum(1) * length).float().mean())
        """Multiplications of a dense channel in a tile, on average."""


@lru_cache(maxsize=256)
def tiles(out: Pair, into: Pair, size: Pair, n: int, stride: Pair, padding: Pair, dilation: Pair, back: bool) -> Tiles:
    """The tiles for outputs [*out, n] from inputs [*into, n].

    With ``back``, for the gradient of the input: ``out`` is then the size of the input, and ``into`` that of the output.
    """

    def source(place: int, tap: int, axis: int) -> int:
        if back:
            place, rest = divmod(place + padding[axis] - tap * dilation[axis], stride[axis])
        else:
            place, rest = place * stride[axis] + tap * dilation[axis] - padding[axis], 0
        return place if rest == 0 and 0 <= place < into[axis] else -1

    def shift(tap: int, axis: int) -> int:
        return -(tap * dilation[axis] // stride[axis]) if back else tap * dilation[axis]

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
    shifts = [(shift(i, 0) * into[1] + shift(j, 1)) * n for i in range(size[0]) for j in range(size[1])]
    return Tiles(place.flatten(), length.flatten(), inputs.flatten(2).flatten(0, 1), shifts, into[0] * into[1] * n)


def _goes_on(first: list[int], other: list[int], apart: int) -> bool:
    """Whether the inputs of a column of outputs that is ``apart`` from the first continue those of the first, for every tap."""
    return all((a < 0 and b < 0) or (a >= 0 and b == a + apart) for a, b in zip(first, other, strict=True))


def _largest(length: int) -> int:
    """The length of a tile that sparse.c has code for, or a rest."""
    size = native.number("pl_sparse_most")
    while size > length and size > 8:
        size //= 2
    return min(size, length)
