"""Batches from tensors that stay on the device: shuffled, cropped and flipped per sample, all in one gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_lottery.errors import UserError


@dataclass(frozen=True, eq=False)
class Split:
    """``inputs`` [n, channels or features, ...] and their ``targets``, on one device.

    Inputs are uint8, and normalised batch by batch, or float and normalised already. Targets are classes, int64 [n], or
    real values, float [n, ...]. Indexing gives normalised float inputs, so that a split can be given to
    :func:`pyro_lottery.predict` as it is.
    """

    inputs: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor
    """Of each index of dimension 1, by which :meth:`normalize` shifts and scales."""

    @property
    def pixels(self) -> Tensor:
        """The inputs by the name that images give them."""
        return self.inputs

    @property
    def labels(self) -> Tensor:
        """The targets by the name that classes give them."""
        return self.targets

    @property
    def device(self) -> torch.device:
        """Where inputs and targets are."""
        return self.inputs.device

    def head(self) -> tuple[Tensor, Tensor]:
        """The first two examples as the network gets them, and their targets."""
        return self[:2], self.targets[:2]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.prepare(self.inputs[index])

    def to(self, device: torch.device) -> Split:
        """The split on ``device``."""
        return Split(*(t.to(device) for t in (self.inputs, self.targets, self.mean, self.std)))

    def prepare(self, inputs: Tensor) -> Tensor:
        """What the network gets of some of this split's ``inputs``: float, and normalised once."""
        return self.normalize(inputs) if inputs.dtype == torch.uint8 else inputs

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalised float inputs of others as they were given: uint8 as ``(inputs / 255 − mean) / std``, floats as
        ``(inputs − mean) / std``.
        """
        if (inputs.dtype == torch.uint8) != (self.inputs.dtype == torch.uint8) or inputs.shape[1:] != self.inputs.shape[
            1:
        ]:
            own, given = ([t.dtype, *t.shape[1:]] for t in (self.inputs, inputs))
            raise UserError(f"inputs are of dtype and shape {given}, the split's {own}; give them as the split's were")
        per_channel = (-1, *(1,) * (inputs.ndim - 2))
        mean, std = self.mean.view(per_channel), self.std.view(per_channel)
        if inputs.dtype == torch.uint8:
            return (inputs.float() / 255 - mean) / std
        return (
            (inputs.double() - mean) / std
        ).float()  # a float32 has no digits left of the difference of large numbers


def crop_and_flip(
    pixels: Tensor, padding: int, flip: bool, generator: torch.Generator, fill: Tensor | None = None
) -> Tensor:
    """Random crop after padding with 0, or with ``fill`` [c], and random horizontal flip, drawn per sample.

    ``pixels`` [b, c, h, w] of any dtype; returns the same shape.
    """
    count, channels, height, width = pixels.shape
    device = pixels.device
    offset = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, device=device)
    rows = offset[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        flipped = torch.randint(0, 2, (count, 1), generator=generator, device=device).bool()
        columns = torch.where(flipped, width - 1 - columns, columns)
    columns = offset[1] + columns
    padded = F.pad(pixels, (padding,) * 4)
    if fill is not None:
        inside = F.pad(torch.ones_like(pixels[0, 0], dtype=torch.bool), (padding,) * 4)
        padded = torch.where(inside, padded, fill.view(-1, 1, 1))
    sample = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[sample, channel, rows.view(count, 1, height, 1), columns.reshape(count, 1, 1, width)]


def shuffle(count: int, batch_size: int, generator: torch.Generator, least: int = 2) -> list[Tensor]:
    """One epoch's batches as index tensors on the generator's device: every example once, in a drawn order.

    A last batch of fewer than ``least`` examples joins the one before, since BatchNorm cannot normalise one.
    """
    order = torch.randperm(count, generator=generator, device=generator.device)
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and len(chunks[-1]) < least:
        chunks[-2:] = [order[-(batch_size + len(chunks[-1])) :]]
    return chunks


def batch(split: Split, indices: Tensor, augment: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normalised inputs and targets of the examples ``indices``.

    ``augment`` is ``none``, ``crop`` (padding of one eighth of the width: 4 pixels at 32×32) or ``crop_flip``.
    """
    inputs = split.inputs[indices]
    if augment != "none":
        black = None if inputs.dtype == torch.uint8 else (-split.mean / split.std).to(inputs.dtype)  # 0, normalised
        inputs = crop_and_flip(inputs, inputs.shape[-1] // 8, augment == "crop_flip", generator, black)
    return split.prepare(inputs), split.targets[indices]


class Epoch:
    """One pass over a :class:`Split` for training: the batches that :func:`shuffle` draws when this is made."""

    whole_only = False
    """A training can stop and go on after any batch."""

    def __init__(self, split: Split, batch_size: int, augment: str, order: torch.Generator, least: int = 2):
        self._split, self._augment, self._order = split, augment, order
        self._chunks = shuffle(len(split), batch_size, order, least)

    def __len__(self) -> int:
        return len(self._chunks)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch ``step``; augmentation follows the order in which batches are asked for."""
        return batch(self._split, self._chunks[step], self._augment, self._order)

    def end(self) -> None:
        """Called after the last batch."""
