"""Batches from tensors that stay on the device: shuffled, cropped and flipped per sample, all in one gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Split:
    """uint8 ``pixels`` [n, channels, height, width] and int64 ``labels`` [n] on one device.

    Indexing gives normalised float images, ``(pixels / 255 − mean) / std`` per channel, so that a split can be
    given to :func:`pyro_lottery.predict` as it is.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.normalize(self.pixels[index])

    def to(self, device: torch.device) -> Split:
        """The split on ``device``."""
        return Split(*(t.to(device) for t in (self.pixels, self.labels, self.mean, self.std)))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalised float images of uint8 ``pixels``."""
        return (pixels.float() / 255 - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def crop_and_flip(pixels: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop after zero padding and random horizontal flip, drawn per sample.

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
    """Normalised images and labels of the examples ``indices``.

    ``augment`` is ``none``, ``crop`` (padding of one eighth of the width: 4 pixels at 32×32) or ``crop_flip``.
    """
    pixels = split.pixels[indices]
    if augment != "none":
        pixels = crop_and_flip(pixels, pixels.shape[-1] // 8, augment == "crop_flip", generator)
    return split.normalize(pixels), split.labels[indices]
