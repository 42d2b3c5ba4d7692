"""A data set of up to three splits, its checksum, and stratified parts of a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_lottery import files, seeds
from pyro_lottery.data.batches import Split
from pyro_lottery.data.streams import Stream
from pyro_lottery.errors import UserError
from pyro_lottery.trees import first_tensor


@dataclass(frozen=True, eq=False)
class Data:
    """A training split, an optional test and validation split, and the augmentation of the training images."""

    train: Split | Stream
    test: Split | Stream | None
    val: Split | Stream | None
    num_classes: int | None
    """Number of classes, or None if targets are real values."""
    augment: str
    checksum: int
    """CRC-32 of the inputs and targets, by which a resumed run recognises its data."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels, or None if they are unknown."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example without the batch dimension: (channels, height, width) for an image."""
        if isinstance(self.train, Stream):
            return tuple(first_tensor(self.train.head()[0]).shape[1:])
        return tuple(self.train.inputs.shape[1:])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels. Raises ``UserError`` if examples are not images."""
        if len(self.input_shape) != 3:
            raise UserError(
                f"examples have the shape {self.input_shape} and are not images; images are [channels, height, width]"
            )
        return self.input_shape[1], self.input_shape[2]

    @property
    def in_channels(self) -> int:
        """Number of channels of an image or a signal, or of features of a table."""
        return self.input_shape[0]

    def to(self, device: torch.device) -> Data:
        """Return the data with all splits on ``device``."""
        test, val = (None if split is None else split.to(device) for split in (self.test, self.val))
        return replace(self, train=self.train.to(device), test=test, val=val)


def in_memory(split: Split | Stream | None) -> Split:
    """Return ``split`` if it is a :class:`Split`. Raises ``UserError`` for a stream and for None."""
    if not isinstance(split, Split):
        raise UserError("this needs a split that is held in memory; make one with pl.data.from_tensors")
    return split


def stratified_split(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off ``count`` random examples, chosen by ``seed``, and return them and the rest.

    Each class keeps its proportion (to one example). Real targets have no classes, so any ``count`` examples are taken.
    """
    order = torch.randperm(len(split), generator=seeds.generator("cpu", seed, "split"))
    labels = torch.zeros(len(order)) if split.targets.is_floating_point() else split.targets[order]
    # The rank of each example within its class, as a fraction of the class; the `count` smallest are a stratified sample.
    rank = torch.empty(len(order), dtype=torch.double)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        rank[members] = (torch.arange(len(members), dtype=torch.double) + 0.5) / len(members)
    chosen = order[rank.argsort(stable=True)]
    first, rest = chosen[:count].sort().values, chosen[count:].sort().values

    def part(index: Tensor) -> Split:
        return replace(split, inputs=split.inputs[index], targets=split.targets[index])

    return part(first), part(rest)


def checksum_of(inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], normalize: bool = True) -> int:
    """Return the checksum of the data before normalisation, whose results may differ in the last bit between machines."""
    named = {"a": "train_x", "b": "train_y", "c": "test_x", "d": "test_y", "e": "val_x", "f": "val_y"}
    tensors = {**inputs, **targets}
    found = {letter: tensors[name].cpu() for letter, name in named.items() if name in tensors}
    images = found["a"].dtype == torch.uint8 and found["a"].ndim == 4 and not found["b"].is_floating_point()
    kinds = {letter: (t.dtype, tuple(t.shape)) for letter, t in found.items()}
    return files.checksum(found, "" if images and normalize else f"{kinds} {normalize}")
