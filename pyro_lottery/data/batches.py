"""Batches of examples that stay on the device: shuffled, cropped and flipped by one indexing operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_lottery.data.arrays import as_tensor
from pyro_lottery.errors import UserError, unknown

AUGMENTATIONS = ("none", "crop", "crop_flip")


@dataclass(frozen=True, eq=False)
class Split:
    """Examples held in memory: ``inputs`` [n, channels or features, ...] and ``targets``, on one device.

    Inputs are uint8 (normalised batch by batch) or float (already normalised). Targets are classes, int64 [n], or real
    values, float [n, ...]. Indexing returns normalised float inputs, so a split can be passed to
    :func:`pyro_lottery.predict`.
    """

    inputs: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor
    """Mean and standard deviation [channels or features] with which :meth:`normalize` shifts and scales."""

    @property
    def pixels(self) -> Tensor:
        """The inputs [n, channels, height, width], under their name for images."""
        return self.inputs

    @property
    def labels(self) -> Tensor:
        """The targets [n], under their name for classes."""
        return self.targets

    @property
    def device(self) -> torch.device:
        """Device of the inputs and targets."""
        return self.inputs.device

    def head(self) -> tuple[Tensor, Tensor]:
        """Return the first two inputs [2, ...], normalised, and their targets [2, ...]."""
        return self[:2], self.targets[:2]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.prepare(self.inputs[index])

    def to(self, device: torch.device) -> Split:
        """Return the split on ``device``."""
        return Split(*(t.to(device) for t in (self.inputs, self.targets, self.mean, self.std)))

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return some of this split's ``inputs`` [n, ...] as the network takes them: normalised floats of the same shape."""
        return self.normalize(inputs) if inputs.dtype == torch.uint8 else inputs

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalise new inputs: uint8 as ``(inputs / 255 − mean) / std``, floats as ``(inputs − mean) / std``.

        Arrays are converted. Raises ``UserError`` if dtype or shape differ from those of the split's examples.
        """
        inputs = as_tensor("inputs", inputs).to(self.device)
        own, given = ([t.dtype, *t.shape[1:]] for t in (self.inputs, inputs))
        if (given[0] == torch.uint8) != (own[0] == torch.uint8) or given[1:] != own[1:]:
            raise UserError(f"inputs have dtype and shape {given}, but those of the split have {own}; give the same")
        per_channel = (-1, *(1,) * (inputs.ndim - 2))
        mean, std = self.mean.view(per_channel), self.std.view(per_channel)
        if inputs.dtype == torch.uint8:
            return (inputs.float() / 255 - mean) / std
        # In float32, differences of large numbers would lose all digits.
        return ((inputs.double() - mean) / std).float()


def check_augment(augment: str, inputs: Tensor) -> None:
    """Raise ``UserError`` for an unknown augmentation, and for one of images if ``inputs`` are not images."""
    if augment not in AUGMENTATIONS:
        raise unknown("augment", augment, AUGMENTATIONS)
    if augment != "none" and inputs.ndim != 4:
        raise UserError(
            f"augment={augment!r} is for images [n, channels, height, width], but inputs are {list(inputs.shape)}; use 'none'"
        )


def crop_and_flip(
    pixels: Tensor, padding: int, flip: bool, generator: torch.Generator, fill: Tensor | None = None
) -> Tensor:
    """Pad each image with 0, or with ``fill`` [c], crop it at random and, with ``flip``, flip half of them horizontally.

    ``pixels`` is [b, c, h, w] of any dtype, and so is the result. Each image has a random offset and flip of its own.
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
    """Return the batches of one epoch as index tensors [b] on the generator's device: every example once, in random order.

    What is left of fewer than ``least`` examples joins the batch before, since BatchNorm cannot normalise one example.
    """
    order = torch.randperm(count, generator=generator, device=generator.device)
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and 0 < count % batch_size < least:
        chunks[-2:] = [order[-(batch_size + len(chunks[-1])) :]]
    return chunks


def batch(split: Split, indices: Tensor, augment: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return normalised inputs [b, ...] and targets [b, ...] of the examples ``indices`` [b].

    ``augment`` is ``none``, ``crop`` (padded by one eighth of the width: 4 pixels at 32×32) or ``crop_flip``.
    """
    inputs = split.inputs[indices]
    if augment != "none":
        # Padding is 0 before normalisation.
        black = None if inputs.dtype == torch.uint8 else (-split.mean / split.std).to(inputs.dtype)
        inputs = crop_and_flip(inputs, inputs.shape[-1] // 8, augment == "crop_flip", generator, black)
    return split.prepare(inputs), split.targets[indices]


class Epoch:
    """One training pass over a :class:`Split`; the order of its examples is drawn by :func:`shuffle` at construction.

    Random crops and flips follow ``order`` too, or the generator that ``augmentation`` makes for each step.
    """

    whole_only = False
    """Training may stop and resume after any batch."""

    def __init__(
        self, split: Split, batch_size: int, augment: str, order: torch.Generator, least: int = 2,
        augmentation: Callable[[int], torch.Generator] | None = None,
    ):  # fmt: skip
        self._split, self._augment, self._order, self._augmentation = split, augment, order, augmentation
        self._chunks = shuffle(len(split), batch_size, order, least)

    def __len__(self) -> int:
        return len(self._chunks)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs [b, ...] and targets [b, ...] of batch ``step``.

        Random crops and flips that follow ``order`` depend on the order of calls.
        """
        generator = self._augmentation(step) if self._augmentation else self._order
        return batch(self._split, self._chunks[step], self._augment, generator)

    def end(self) -> None:
        """Finish the pass, after its last batch; there is nothing to check here."""
