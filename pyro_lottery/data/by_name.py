"""Data sets by name: downloads, scikit-learn's digits and folders of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyro_lottery import seeds
from pyro_lottery.data import folders, sources
from pyro_lottery.data.batches import Split, check_augment
from pyro_lottery.data.images import SIDES
from pyro_lottery.data.splits import Data, checksum_of, in_memory, stratified_split
from pyro_lottery.data.statistics import mean_and_std
from pyro_lottery.errors import UserError, unknown

_SOURCES = {
    "cifar10": (sources.torchvision_source("CIFAR10", "cifar-10-python.tar.gz"), "crop_flip"),
    "cifar100": (sources.torchvision_source("CIFAR100", "cifar-100-python.tar.gz"), "crop_flip"),
    "svhn": (sources.torchvision_source("SVHN", "train_32x32.mat and test_32x32.mat"), "crop"),
    "digits": (sources.digits, "none"),
    "folder": (folders.folder, "crop_flip"),
}
"""The function that loads each data set, and its usual augmentation."""

DOWNLOADS = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100), "svhn": (73_257, 26_032, 10)}
"""Numbers of training images, test images and classes of the downloadable data sets, whose images are all 3×32×32."""

OWN = "own"
"""Name of a data set that was made in Python, in a config."""

_TITLES = {
    OWN: "own data",
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "digits": "digits (8×8)",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
}  # fmt: skip


def list_datasets() -> list[str]:
    """Return the names of data sets that :func:`load` accepts.

    >>> list_datasets()
    ['cifar10', 'cifar100', 'svhn', 'digits', 'folder']
    """
    return list(_SOURCES)


def title(name: str, data_dir: str | Path, image_size: int | None = None) -> str:
    """Return the title of a data set for figures; a folder of images has the folder's name, and resizing adds the size.

    >>> title("folder", "data/cifar10-jpeg"), title("cifar100", "data", 64)
    ('CIFAR-10 (JPEG)', 'CIFAR-100, 64×64')
    """
    name = Path(data_dir).name if name == "folder" else name
    return _TITLES.get(name, name) + (f", {image_size}×{image_size}" if image_size else "")


def load(
    name: str,
    data_dir: str | Path = "data",
    *,
    device: torch.device | str = "cpu",
    train_size: int | None = None,
    test_size: int | None = None,
    val_fraction: float = 0.0,
    augment: str = "auto",
    image_size: int | None = None,
    seed: int = 0,
    write: bool = True,
) -> Data:
    """Load a data set by name onto ``device``.

    ``train_size`` images are taken from the training set and ``val_fraction`` of these are held out for validation, both
    stratified by class and chosen by ``seed``. ``test_size`` images are taken from the test set, also stratified; they are
    always the same. ``augment`` is ``none``, ``crop``, ``crop_flip``, or ``auto``: crop and flip for natural images, crop for
    SVHN and none for digits. With ``image_size`` N, the shorter side of every image is resized to N pixels and the centre
    N×N is cut out. Without ``write``, nothing is downloaded and decoded images are not stored. Raises ``UserError`` for an
    unknown name, sizes that do not fit, and data that cannot be read.
    """
    if name == OWN:
        raise UserError(
            "--dataset own: these data were made in Python and are not stored; pass them to pl.find_tickets again"
        )
    if name not in _SOURCES:
        raise unknown("dataset", name, list_datasets())
    if image_size is not None and image_size not in SIDES:
        raise UserError(f"image_size must be a whole number from {SIDES[0]} to {SIDES[-1]}, got {image_size!r}")
    source, usual = _SOURCES[name]
    try:
        found = source(Path(data_dir), write, image_size)
    except OSError as error:
        raise UserError(f"--data-dir {data_dir} cannot be used ({error}); give a folder that can be read") from error
    data = _from_pixels(*found.train, *found.test, usual if augment == "auto" else augment)
    if found.classes is not None:  # the last class may have no images
        data = replace(data, num_classes=len(found.classes), classes=found.classes)
    train = _subset(in_memory(data.train), "train", train_size, seeds.derive(seed, "train-size"))
    test_part, val = _subset(in_memory(data.test), "test", test_size, seeds.derive(0, "test-size")), None
    if val_fraction:
        held_out = round(val_fraction * len(train))
        if not 0 < held_out < len(train):
            raise UserError(
                f"--val-fraction {val_fraction} of {len(train)} training images holds out {held_out}; both parts need at least one"
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


def _from_pixels(pixels: Tensor, labels: Tensor, test_pixels: Tensor, test_labels: Tensor, augment: str) -> Data:
    """Make a :class:`Data` from uint8 images and labels of a source, without copying them."""
    check_augment(augment, pixels)
    mean, std = mean_and_std(pixels)
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    if num_classes < 2:
        raise UserError("the data have one class; a classifier needs at least two")
    checksum = checksum_of({"train_x": pixels, "test_x": test_pixels}, {"train_y": labels, "test_y": test_labels})
    train, test = Split(pixels, labels, mean, std), Split(test_pixels, test_labels, mean, std)
    return Data(train, test, None, num_classes, augment, checksum)
