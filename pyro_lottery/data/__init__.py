"""Data sets: tensors on the device, normalised and augmented batch by batch, or streams of batches from loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lottery import files, seeds
from pyro_lottery.data import arrays, folders, sources
from pyro_lottery.data.batches import Epoch, Split, batch, crop_and_flip, shuffle
from pyro_lottery.data.images import PIXELS, SIDES
from pyro_lottery.data.shifts import CORRUPTIONS, OOD, SEVERITIES, corrupt, out_of_distribution
from pyro_lottery.data.streams import Stream, StreamEpoch, classes_of, known, measured_stream, recorded, stream_of
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.trees import first_tensor, tensors

_SOURCES = {
    "cifar10": (sources.torchvision_source("CIFAR10", "cifar-10-python.tar.gz"), "crop_flip"),
    "cifar100": (sources.torchvision_source("CIFAR100", "cifar-100-python.tar.gz"), "crop_flip"),
    "svhn": (sources.torchvision_source("SVHN", "train_32x32.mat and test_32x32.mat"), "crop"),
    "digits": (sources.digits, "none"),
    "folder": (folders.folder, "crop_flip"),
}
AUGMENTATIONS = ("none", "crop", "crop_flip")
DOWNLOADS = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100), "svhn": (73_257, 26_032, 10)}
"""Numbers of training images, test images and classes of the downloadable data sets, whose images are all 3×32×32."""


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


def from_loaders(
    train: Any, test: Any = None, val: Any = None, *, num_data: int | None = None, num_classes: int | None = None
) -> Data:
    """Make a :class:`Data` whose splits are read batch by batch from DataLoaders or other iterables with a length.

    A batch is a pair (x, y) of the network's input and the targets (floats or integers); x may be a tuple, list or mapping of
    tensors for a ``forward`` with several inputs. ``test`` and ``val`` may also be a :class:`Split`. ``num_data`` is the
    number of training examples in a pass and ``num_classes`` the number of classes; each is needed if it cannot be found
    from the loader. An epoch is one pass over ``train``. The random numbers of a pass, including those of numpy, Python and
    workers, follow the seed of the training. Raises ``UserError`` if the loaders or their first batches are not usable.
    """
    for name, number in (("num_data", num_data), ("num_classes", num_classes)):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"{name} must be a whole number of at least 1, got {number!r}")
    stream = stream_of(train, "train", num_data)
    x, y = stream.head()
    if num_classes and y.is_floating_point():
        raise UserError(f"num_classes is {num_classes}, but the targets are real ({y.dtype}); give labels as y.long()")
    found, names = (num_classes, None) if num_classes else classes_of(train, y, "train")
    others = [
        each if each is None or isinstance(each, Split) else measured_stream(each, name)
        for name, each in (("test", test), ("val", val))
    ]
    facts = [stream.num_data, stream.steps, [(tuple(t.shape[1:]), str(t.dtype)) for t in tensors((x, y))]]
    told = {f"{part}/{i}": t.cpu() for part, each in enumerate((stream, *others)) for i, t in enumerate(known(each))}
    return Data(stream, others[0], others[1], found, "none", files.checksum(told, str(facts)), names)


def list_datasets() -> list[str]:
    """Return the names of data sets that :func:`load` accepts.

    >>> list_datasets()
    ['cifar10', 'cifar100', 'svhn', 'digits', 'folder']
    """
    return list(_SOURCES)


OWN = "own"
"""Name of a data set that was made in Python, in a config."""
_TITLES = {
    OWN: "own data",
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "digits": "digits (8×8)",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
}  # fmt: skip


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


def from_tensors(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    *,
    val_x: Any = None,
    val_y: Any = None,
    normalize: bool = True,
    augment: str = "none",
    classes: Sequence[str] | None = None,
    channels_last: bool | None = None,
) -> Data:
    """Make a :class:`Data` from torch tensors, numpy arrays or DataFrames, which are copied.

    Inputs are [n, features], [n, channels, length], [n, channels, height, width] and so on, of any real dtype; with
    ``channels_last``, the last dimension holds the channels. They are normalised by the mean and standard deviation of each
    feature or channel over the training set, computed in double precision. With ``normalize=False``, uint8 inputs are
    divided by 255 and others stay as they are. ``data.train.normalize(x)`` normalises new inputs (channels first).

    Integer targets [n] are classes, 0 to C − 1. Float targets [n, ...] are real values, even if they are whole numbers, and
    are not normalised. ``classes`` names the classes; without it, every class needs a training example. ``augment`` is
    ``none`` or, for images, ``crop`` (padding has the value that was 0 before normalisation) or ``crop_flip``. The data are
    on the device of ``train_x`` if that is a tensor. Raises ``UserError`` for inputs or targets that are not usable.
    """
    given = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    if (val_x is None) != (val_y is None):
        raise UserError("val_x and val_y belong together; give both or neither")
    given |= {} if val_x is None else {"val_x": val_x, "val_y": val_y}
    arrays.check_arguments(given)
    inputs = arrays.check_inputs({name: v for name, v in given.items() if name.endswith("_x")}, channels_last)
    device, train = inputs["train_x"].device, inputs["train_x"]
    inputs = {name: x.to(device) for name, x in inputs.items()}
    _check_augment(augment, train)
    names = arrays.check_names(classes)
    targets, num_classes = arrays.check_targets({n: v for n, v in given.items() if n.endswith("_y")}, inputs, names)
    targets = {name: y.to(device) for name, y in targets.items()}
    checksum = _checksum(inputs, targets, normalize)
    if train.dtype == torch.uint8:
        mean, std = _mean_and_std(train) if normalize else (torch.zeros(train.shape[1]), torch.ones(train.shape[1]))
        inputs = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    elif normalize:
        mean, std = arrays.statistics("train_x", train)
        std = torch.where(std == 0, 1.0, std)
        inputs = {name: arrays.normalized(name, x, mean, std) for name, x in inputs.items()}
    else:
        mean, std = (v.double() for v in (torch.zeros(train.shape[1]), torch.ones(train.shape[1])))
        inputs = {name: arrays.as_float32(name, x) for name, x in inputs.items()}
    splits = {
        part: Split(inputs[f"{part}_x"], targets[f"{part}_y"], mean.to(device), std.to(device))
        for part in ("train", "test", "val")
        if f"{part}_x" in inputs
    }
    return Data(splits["train"], splits["test"], splits.get("val"), num_classes, augment, checksum, names)


def _from_pixels(pixels: Tensor, labels: Tensor, test_pixels: Tensor, test_labels: Tensor, augment: str) -> Data:
    """Make a :class:`Data` from uint8 images and labels of a source, without copying them."""
    _check_augment(augment, pixels)
    mean, std = _mean_and_std(pixels)
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    if num_classes < 2:
        raise UserError("the data have one class; a classifier needs at least two")
    checksum = _checksum({"train_x": pixels, "test_x": test_pixels}, {"train_y": labels, "test_y": test_labels})
    train, test = Split(pixels, labels, mean, std), Split(test_pixels, test_labels, mean, std)
    return Data(train, test, None, num_classes, augment, checksum)


def _check_augment(augment: str, inputs: Tensor) -> None:
    if augment not in AUGMENTATIONS:
        raise unknown("augment", augment, ("auto", *AUGMENTATIONS))
    if augment != "none" and inputs.ndim != 4:
        raise UserError(
            f"augment={augment!r} is for images [n, channels, height, width], but inputs are {list(inputs.shape)}; use 'none'"
        )


def _checksum(inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], normalize: bool = True) -> int:
    """Return the checksum of the data before normalisation, whose results may differ in the last bit between machines."""
    named = {"a": "train_x", "b": "train_y", "c": "test_x", "d": "test_y", "e": "val_x", "f": "val_y"}
    tensors = {**inputs, **targets}
    found = {letter: tensors[name].cpu() for letter, name in named.items() if name in tensors}
    images = found["a"].dtype == torch.uint8 and found["a"].ndim == 4 and not found["b"].is_floating_point()
    kinds = {letter: (t.dtype, tuple(t.shape)) for letter, t in found.items()}
    return files.checksum(found, "" if images and normalize else f"{kinds} {normalize}")


def _mean_and_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    # The histogram of each channel gives exact results without a float copy of the data set.
    values = torch.arange(256, dtype=torch.double) / 255
    parts = []
    for channels in pixels.split(256, 1):  # a table may have thousands of features
        counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in channels.unbind(1)]).cpu()
        weights = counts.double() / counts.sum(1, keepdim=True)
        mean = weights @ values
        std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
        constant = (counts > 0).sum(1) == 1  # its standard deviation of 0 would divide by zero
        parts.append((mean.float(), torch.where(constant, 1.0, std).float()))
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, std


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


__all__ = [
    "AUGMENTATIONS",
    "CORRUPTIONS",
    "DOWNLOADS",
    "OOD",
    "OWN",
    "PIXELS",
    "SEVERITIES",
    "SIDES",
    "Data",
    "Epoch",
    "Split",
    "Stream",
    "StreamEpoch",
    "batch",
    "corrupt",
    "crop_and_flip",
    "from_loaders",
    "from_tensors",
    "in_memory",
    "list_datasets",
    "load",
    "out_of_distribution",
    "recorded",
    "shuffle",
    "stratified_split",
    "stream_of",
    "title",
]  # fmt: skip
