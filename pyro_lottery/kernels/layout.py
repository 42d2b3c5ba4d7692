"""The position of each site in a flat vector of weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Size, Tensor

from pyro_lottery.kernels.kept import with_kept


class Layout:
    """Sites in sequence in a flat vector; with ``masks`` (one bool tensor or None per site), only the kept weights.

    Convolution weights [out, in, h, w] are stored as [out, h, w, in] (channels last), the layout in which convolutions and
    their gradients are fastest, so they need no conversion.
    """

    def __init__(self, shapes: Sequence[Size], masks: Sequence[Tensor | None] = (), device: torch.device | None = None):
        self.shapes = tuple(shapes)
        self.sizes = [shape.numel() for shape in self.shapes]
        self.starts = [0, *accumulate(self.sizes)]
        """Position of each site's first weight among all weights; then the number of all weights."""
        self.masks = tuple(masks) or (None,) * len(self.shapes)
        self.index: Tensor | None = None
        """Positions of the kept weights among all weights, int64, or None if all are kept, even if masks say so."""
        self.kept = self.sizes
        """Number of kept weights of each site."""
        if any(mask is not None and not bool(mask.all()) for mask in self.masks):
            parts = []
            for start, shape, mask in zip(self.starts, self.shapes, self.masks, strict=False):
                full = torch.ones(shape, dtype=torch.bool) if mask is None else mask
                parts.append(flatten(full.to(device)).nonzero().squeeze(1) + start)
            self.kept = [len(part) for part in parts]
            self.index = torch.cat(parts)
        self.offsets = [0, *accumulate(self.kept)]
        """Position of each site's first weight among the kept weights; then the number of kept weights."""
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def total(self) -> int:
        """Number of all weights, kept or not."""
        return self.starts[-1]

    @cached_property
    def index32(self) -> Tensor | None:
        """:attr:`index` as int32."""
        if self.total >= 2**31:
            raise OverflowError(
                f"{self.total} weights are too many for the compiled kernels; use kernels.using('torch')"
            )
        return None if self.index is None else self.index.int()

    def site(self, device: torch.device) -> Tensor:
        """The number of each kept weight's site, int32 [kept]."""
        return self._counted(device)[0]

    def count(self, device: torch.device) -> Tensor:
        """:attr:`kept`, int64 [sites]."""
        return self._counted(device)[1]

    def begins(self, device: torch.device) -> Tensor:
        """:attr:`offsets`, int64 [sites + 1]."""
        return self._counted(device)[2]

    def _counted(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on:
            count = torch.tensor(self.kept, device="cpu")
            site = torch.arange(len(count), dtype=torch.int32, device="cpu").repeat_interleave(
                count, output_size=self.offsets[-1]
            )
            offsets = torch.tensor(self.offsets, device="cpu")
            self._on[device] = site.to(device), count.to(device), offsets.to(device)
        return self._on[device]

    def views_and_kept(self, flat: Tensor, kept: Tensor) -> list[Tensor]:
        """Return :meth:`views` of a vector of all weights, and then the :meth:`parts` of the kept ones if not all are kept."""
        return self.views(flat) if self.index is None else [*self.views(flat), *self.parts(kept)]

    def note_kept(self, found: Sequence[Tensor]) -> None:
        """Note each masked site's kept weights with the site's view, as :meth:`views_and_kept` returned both."""
        for view, mask, part in zip(found, self.masks, found[len(self.shapes) :], strict=False):
            if mask is not None:
                with_kept(view, mask, part)

    def kept_of(self, grads: Sequence[Tensor | None], at_once: bool = False) -> Sequence[Tensor | None]:
        """Return the gradient of each site's kept weights [kept], given those of what :meth:`views_and_kept` returned.

        ``at_once`` goes over all weights in two passes, for a GPU, rather than over the kept ones site by site.
        """
        dense = grads[: len(self.shapes)]
        packed = grads[len(self.shapes) :] or [None] * len(dense)
        if self.index is None:
            return [None if grad is None else flatten(grad) for grad in dense]
        if at_once and all(grad is not None for grad in dense) and all(grad is None for grad in packed):
            return self.parts(self.keep(torch.cat([flatten(grad) for grad in dense if grad is not None])))
        found = []
        for number, (whole, part) in enumerate(zip(dense, packed, strict=True)):
            if whole is not None:
                places = self.index[self.offsets[number] : self.offsets[number + 1]] - self.starts[number]
                taken = flatten(whole).index_select(0, places)
                part = taken if part is None else part + taken
            found.append(part)
        return found

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return a view of each site in a vector of all weights.

        A single split is used, because the gradient of each slice would be as large as the whole vector.
        """
        return [unflatten(part, shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return each site's part of a vector of the kept weights."""
        return flat.split(self.kept)

    def keep(self, dense: Tensor) -> Tensor:
        """Return the kept weights of a vector of all weights."""
        return dense if self.index is None else dense.index_select(0, self.index)

    def scatter(self, flat: Tensor) -> Tensor:
        """Return a vector of all weights, given the kept ones; pruned weights are 0."""
        return flat if self.index is None else flat.new_zeros(self.total).index_copy_(0, self.index, flat)


def flatten(value: Tensor) -> Tensor:
    """Return a site's values in the order of the flat vector, without a copy if they are in this order in memory."""
    # contiguous() is needed for expanded tensors, such as the gradient of a sum, which reshape leaves expanded.
    return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).reshape(-1).contiguous()


def unflatten(part: Tensor, shape: Size) -> Tensor:
    """Return a view of a site's part of the flat vector with the site's shape."""
    if len(shape) != 4:
        return part.view(shape)
    out, channels, height, width = shape
    return part.view(out, height, width, channels).permute(0, 3, 1, 2)
