"""Data sets as tensors on the device, with normalisation and augmentation in batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pyro_lottery import files, seeds
from pyro_lottery.data import sources
from pyro_lottery.data.batches import Split, batch, crop_and_flip, shuffle
from pyro_lottery.data.shifts import CORRUPTIONS, OOD, SEVERITIES, corrupt, out_of_distribution
from pyro_lottery.errors import UserError, unknown

_SOURCES = {
    "cifar10": (sources.torchvision_source("CIFAR10", "cifar-10-python.tar.gz"), "crop_flip"),
    "cifar100": (sources.torchvision_source("CIFAR100", "cifar-100-python.tar.gz"), "crop_flip"),
    "svhn": (sources.torchvision_source("SVHN", "train_32x32.mat and test_32x32.mat"), "crop"),
    "digits": (sources.digits, "none"),
    "folder": (sources.folder, "crop_flip"),
}
AUGMENTATIONS = ("none", "crop", "crop_flip")
DOWNLOADS = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100), "svhn": (73_257, 26_032, 10)}
"""Training images, test images and classes of the data sets that are downloaded; all images are 3×32×32."""


@dataclass(frozen=True, eq=False)
class Data:
    """A training, a test and perhaps a validation split, and the augmentation the training images get."""

    train: Split
    test: Split
    val: Split | None
    num_classes: int | None
    """None where targets are real values."""
    augment: str
    checksum: int
    """CRC-32 of all inputs and targets, by which a resumed run knows its data."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels, where they are known."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example, without the batch: (channels, height, width) of an image."""
        return tuple(self.test.inputs.shape[1:])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels; ``UserError`` for examples that are no images."""
        if len(self.input_shape) != 3:
            raise UserError(
                f"an example of shape {self.input_shape} is no image; images are [n, channels, height, width]"
            )
        return self.input_shape[1], self.input_shape[2]

    @property
    def in_channels(self) -> int:
        """Channels of an image or a signal, features of a table."""
        return self.input_shape[0]

    def to(self, device: torch.device) -> Data:
        """All splits on ``device``."""
        val = None if self.val is None else self.val.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), val=val)


def list_datasets() -> list[str]:
    """Names that :func:`load` knows.

    >>> list_datasets()
    ['cifar10', 'cifar100', 'svhn', 'digits', 'folder']
    """
    return list(_SOURCES)


_TITLES = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "digits": "digits (8×8)",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
}  # fmt: skip


def title(name: str, data_dir: str | Path) -> str:
    """What to call a data set in a title; a folder of images by its own name.

    >>> title("folder", "data/cifar10-jpeg"), title("cifar100", "data")
    ('CIFAR-10 (JPEG)', 'CIFAR-100')
    """
    name = Path(data_dir).name if name == "folder" else name
    return _TITLES.get(name, name)


def load(
    name: str,
    data_dir: str | Path = "data",
    *,
    device: torch.device | str = "cpu",
    train_size: int | None = None,
    test_size: int | None = None,
    val_fraction: float = 0.0,
    augment: str = "auto",
    seed: int = 0,
    write: bool = True,
) -> Data:
    """Load a data set by name onto ``device``.

    ``train_size`` images are taken from the training set, stratified by class, and ``val_fraction`` of them are
    then held out, stratified too; both follow ``seed``. ``test_size`` images are taken from the test set, stratified
    and always the same ones. ``augment="auto"`` is crop and flip for natural images,
    crop for SVHN and none for digits. Without ``write`` nothing is downloaded, and decoded images are not kept.
    Raises ``UserError`` for bad input.
    """
    if name not in _SOURCES:
        raise unknown("dataset", name, list_datasets())
    source, usual = _SOURCES[name]
    try:
        (pixels, labels), test = source(Path(data_dir), write)
    except OSError as error:
        raise UserError(f"--data-dir {data_dir} cannot be used ({error}); give a folder that can be read") from error
    data = from_tensors(pixels, labels, *test, augment=usual if augment == "auto" else augment)
    train = _subset(data.train, "train", train_size, seeds.derive(seed, "train-size"))
    test_part, val = _subset(data.test, "test", test_size, seeds.derive(0, "test-size")), None
    if val_fraction:
        held_out = round(val_fraction * len(train))
        if not 0 < held_out < len(train):
            raise UserError(
                f"--val-fraction {val_fraction} of {len(train)} training images holds out {held_out}; both parts need some"
            )
        train, val = stratified_split(train, len(train) - held_out, seeds.derive(seed, "val"))
    return replace(data, train=train, test=test_part, val=val).to(torch.device(device))


def _subset(split: Split, name: str, size: int | None, seed: int) -> Split:
    if size is None:
        return split
    if not 0 < size <= len(split):
        full = {"train": "training"}.get(name, name)
        raise UserError(f"--{name}-size {size}: the {full} set has {len(split)} images; choose 1 to {len(split)}")
    return stratified_split(split, size, seed)[0]


def from_tensors(
    pixels: Tensor, labels: Tensor, test_pixels: Tensor, test_labels: Tensor, *, augment: str = "none"
) -> Data:
    """A :class:`Data` from uint8 images [n, c, h, w] and integer labels; mean and std are the training images'."""
    if pixels.dtype != torch.uint8 or test_pixels.dtype != torch.uint8:
        raise UserError(f"images must be uint8 [n, c, h, w], 0 to 255; got {pixels.dtype}")
    if augment not in AUGMENTATIONS:
        raise unknown("augment", augment, ("auto", *AUGMENTATIONS))
    mean, std = _mean_and_std(pixels)
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    if num_classes < 2:
        raise UserError("the data have one class; a classifier needs at least two")
    checksum = files.checksum({"a": pixels, "b": labels, "c": test_pixels, "d": test_labels})
    train, test = Split(pixels, labels, mean, std), Split(test_pixels, test_labels, mean, std)
    return Data(train, test, None, num_classes, augment, checksum)


def _mean_and_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    # From the histogram of each channel: exact, and without a float copy of the data set.
    values = torch.arange(256, dtype=torch.double) / 255
    counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in pixels.unbind(1)])
    weights = counts.double() / counts.sum(1, keepdim=True)
    mean = weights @ values
    std = (weights @ values**2 - mean**2).clamp_min(1e-6).sqrt()  # a constant channel must not divide by zero
    return mean.float(), std.float()


def stratified_split(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """``count`` examples with every class in its proportion (to one example), and the rest."""
    order = torch.randperm(len(split), generator=seeds.generator("cpu", seed, "split"))
    labels = split.labels[order]
    # Rank of each example within its class, as a fraction of the class: the `count` smallest are a stratified sample.
    rank = torch.empty(len(order), dtype=torch.double)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        rank[members] = (torch.arange(len(members), dtype=torch.double) + 0.5) / len(members)
    chosen = order[rank.argsort(stable=True)]
    first, rest = chosen[:count].sort().values, chosen[count:].sort().values

    def part(index: Tensor) -> Split:
        return replace(split, inputs=split.inputs[index], targets=split.targets[index])

    return part(first), part(rest)


__all__ = [
    "AUGMENTATIONS",
    "CORRUPTIONS",
    "DOWNLOADS",
    "OOD",
    "SEVERITIES",
    "Data",
    "Split",
    "batch",
    "corrupt",
    "crop_and_flip",
    "from_tensors",
    "list_datasets",
    "load",
    "out_of_distribution",
    "shuffle",
    "stratified_split",
    "title",
]  # fmt: skip
