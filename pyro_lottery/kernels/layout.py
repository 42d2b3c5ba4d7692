"""Where each site lies in a flat vector of weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Size, Tensor


class Layout:
    """Sites one after the other in a flat vector; with ``masks``, only the weights that they keep.

    Convolution weights [out, in, h, w] are stored as [out, h, w, in] (channels_last), in which convolutions and their
    gradients are fastest, so that neither is converted. ``masks`` holds one bool tensor or None per site.
    """

    def __init__(self, shapes: Sequence[Size], masks: Sequence[Tensor | None] = (), device: torch.device | None = None):
        self.shapes = tuple(shapes)
        self.sizes = [shape.numel() for shape in self.shapes]
        self.starts = [0, *accumulate(self.sizes)]
        """Of each site among all weights, and their number."""
        self.masks = tuple(masks) or (None,) * len(self.shapes)
        self.index: Tensor | None = None
        """Positions of the kept weights among all, int64; None keeps all."""
        self.kept = self.sizes
        """Number of kept weights per site."""
        if any(mask is not None for mask in self.masks):
            parts = []
            for start, shape, mask in zip(self.starts, self.shapes, self.masks, strict=False):
                full = torch.ones(shape, dtype=torch.bool) if mask is None else mask
                parts.append(flatten(full.to(device)).nonzero().squeeze(1) + start)
            self.kept = [len(part) for part in parts]
            self.index = torch.cat(parts)
        self.offsets = [0, *accumulate(self.kept)]
        """Of each site among the kept weights, and their number."""

    @property
    def total(self) -> int:
        """Number of all weights, kept or not."""
        return self.starts[-1]

    @cached_property
    def index32(self) -> Tensor | None:
        """:attr:`index` in half the memory."""
        if self.total >= 2**31:
            raise OverflowError(
                f"{self.total} weights are too many for the compiled kernels; use kernels.using('torch')"
            )
        return None if self.index is None else self.index.int()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Every site's view of a vector of all weights; one split, since a slice each would cost a full gradient each."""
        return [unflatten(part, shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Every site's part of a vector of the kept weights."""
        return flat.split(self.kept)

    def keep(self, dense: Tensor) -> Tensor:
        """The kept weights out of a vector of all."""
        return dense if self.index is None else dense.index_select(0, self.index)

    def scatter(self, flat: Tensor) -> Tensor:
        """The vector of all weights with zeros where none is kept."""
        return flat if self.index is None else flat.new_zeros(self.total).index_copy(0, self.index, flat)


def flatten(value: Tensor) -> Tensor:
    """A site's values in the order in which a flat vector holds them: no copy if they lie so in memory already."""
    # reshape alone leaves the strides of an expanded tensor, such as the gradient of a sum
    return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).reshape(-1).contiguous()


def unflatten(part: Tensor, shape: Size) -> Tensor:
    """The view of a flat part that has the site's shape."""
    if len(shape) != 4:
        return part.view(shape)
    out, channels, height, width = shape
    return part.view(out, height, width, channels).permute(0, 3, 1, 2)
