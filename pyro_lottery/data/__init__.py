"""Data sets as tensors on the device, with normalisation and augmentation in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lottery import files, seeds
from pyro_lottery.data import arrays as own
from pyro_lottery.data import folders, sources
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
"""Training images, test images and classes of the data sets that are downloaded; all images are 3×32×32."""


@dataclass(frozen=True, eq=False)
class Data:
    """A training, a test and perhaps a validation split, and the augmentation the training images get."""

    train: Split | Stream
    test: Split | Stream | None
    val: Split | Stream | None
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
        if isinstance(self.train, Stream):
            return tuple(first_tensor(self.train.head()[0]).shape[1:])
        return tuple(self.train.inputs.shape[1:])

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
        test, val = (None if split is None else split.to(device) for split in (self.test, self.val))
        return replace(self, train=self.train.to(device), test=test, val=val)


def in_memory(split: Split | Stream | None) -> Split:
    """A split that holds its examples; ``UserError`` for a stream."""
    if not isinstance(split, Split):
        raise UserError(
            "this needs a split that is held in memory, and there is none; make one by pl.data.from_tensors"
        )
    return split


def from_loaders(
    train: Any, test: Any = None, val: Any = None, *, num_data: int | None = None, num_classes: int | None = None
) -> Data:
    """A :class:`Data` whose splits are read batch by batch (:class:`Stream`): DataLoaders, or other iterables with a length.

    A batch is a pair (x, y) of what the network gets and its targets, floats or integers; x may be a tuple, a list or a mapping
    of tensors, for a ``forward`` of several inputs. ``test`` and ``val`` may also be a :class:`Split`. ``num_data``, the
    training examples in a pass, is needed where the loader does not tell; so is ``num_classes`` of classes. An epoch is one pass
    over ``train``; its random numbers, also those of numpy and Python and of workers, follow the training's seed. Raises
    ``UserError`` in one line for whatever is odd in the first batch.
    """
    for name, number in (("num_data", num_data), ("num_classes", num_classes)):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"{name} must be a whole number, at least 1, got {number!r}")
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
    """Names that :func:`load` knows.

    >>> list_datasets()
    ['cifar10', 'cifar100', 'svhn', 'digits', 'folder']
    """
    return list(_SOURCES)


OWN = "own"
"""What a config calls data that were made in Python."""
_TITLES = {
    OWN: "own data",
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "digits": "digits (8×8)",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
}  # fmt: skip


def title(name: str, data_dir: str | Path, image_size: int | None = None) -> str:
    """What to call a data set in a title; a folder of images by its own name, and resized images with their size.

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

    ``train_size`` images are taken from the training set, stratified by class, and ``val_fraction`` of them are
    then held out, stratified too; both follow ``seed``. ``test_size`` images are taken from the test set, stratified
    and always the same ones. ``augment="auto"`` is crop and flip for natural images,
    crop for SVHN and none for digits. With ``image_size`` N the shorter side of every image is resized to N pixels, and the
    centre cut out, N×N. Without ``write`` nothing is downloaded, and decoded images are not kept.
    Raises ``UserError`` for bad input.
    """
    if name == OWN:
        raise UserError(
            "--dataset own: these data were made in Python, and are no files; give them to pl.find_tickets again"
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
    if found.classes is not None:  # the last may have no images
        data = replace(data, num_classes=len(found.classes), classes=found.classes)
    train = _subset(in_memory(data.train), "train", train_size, seeds.derive(seed, "train-size"))
    test_part, val = _subset(in_memory(data.test), "test", test_size, seeds.derive(0, "test-size")), None
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
    """A :class:`Data` from one's own torch tensors, numpy arrays or DataFrames, which are copied.

    Inputs are [n, features], [n, channels, length], [n, channels, height, width] and so on, of any real dtype; with
    ``channels_last`` the channels are the last dimension. They are normalised by the training set's mean and standard
    deviation of each feature or channel, computed in double precision; without ``normalize`` uint8 is divided by 255, and
    other numbers stay as they are. ``data.train.normalize(x)`` does the same to new inputs, channels first.

    Integer targets [n] are classes, 0 to C − 1. Float targets [n, ...] are real values, whole numbers too, and are never
    normalised. ``classes`` names the classes; without it, every class needs a training example. ``augment`` is ``none``, or
    for images ``crop`` (after padding with what was 0 before normalisation) or ``crop_flip``. All is on the device of
    ``train_x`` if that is a tensor. Raises ``UserError`` in one line for whatever is odd.
    """
    given = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    if (val_x is None) != (val_y is None):
        raise UserError("val_x and val_y belong together; give both or neither")
    given |= {} if val_x is None else {"val_x": val_x, "val_y": val_y}
    own.check_arguments(given)
    inputs = own.check_inputs({name: v for name, v in given.items() if name.endswith("_x")}, channels_last)
    device, train = inputs["train_x"].device, inputs["train_x"]
    inputs = {name: x.to(device) for name, x in inputs.items()}
    _check_augment(augment, train)
    names = own.check_names(classes)
    targets, num_classes = own.check_targets({n: v for n, v in given.items() if n.endswith("_y")}, inputs, names)
    targets = {name: y.to(device) for name, y in targets.items()}
    checksum = _checksum(inputs, targets, normalize)
    if train.dtype == torch.uint8:
        mean, std = _mean_and_std(train) if normalize else (torch.zeros(train.shape[1]), torch.ones(train.shape[1]))
        inputs = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    elif normalize:
        mean, std = own.statistics("train_x", train)
        std = torch.where(std == 0, 1.0, std)
        inputs = {name: own.normalized(name, x, mean, std) for name, x in inputs.items()}
    else:
        mean, std = (v.double() for v in (torch.zeros(train.shape[1]), torch.ones(train.shape[1])))
        inputs = {name: own.as_float32(name, x) for name, x in inputs.items()}
    splits = {
        part: Split(inputs[f"{part}_x"], targets[f"{part}_y"], mean.to(device), std.to(device))
        for part in ("train", "test", "val")
        if f"{part}_x" in inputs
    }
    return Data(splits["train"], splits["test"], splits.get("val"), num_classes, augment, checksum, names)


def _from_pixels(pixels: Tensor, labels: Tensor, test_pixels: Tensor, test_labels: Tensor, augment: str) -> Data:
    """A :class:`Data` of uint8 images and labels from a source, which are not copied."""
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
            f"augment={augment!r} is for images [n, channels, height, width]; inputs are {list(inputs.shape)}: use 'none'"
        )


def _checksum(inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], normalize: bool = True) -> int:
    """Of all inputs as they were given, since their normalised values may differ by a bit between machines."""
    named = {"a": "train_x", "b": "train_y", "c": "test_x", "d": "test_y", "e": "val_x", "f": "val_y"}
    tensors = {**inputs, **targets}
    found = {letter: tensors[name].cpu() for letter, name in named.items() if name in tensors}
    images = found["a"].dtype == torch.uint8 and found["a"].ndim == 4 and not found["b"].is_floating_point()
    kinds = {letter: (t.dtype, tuple(t.shape)) for letter, t in found.items()}
    return files.checksum(found, "" if images and normalize else f"{kinds} {normalize}")


def _mean_and_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    # From the histogram of each channel: exact, and without a float copy of the data set.
    values = torch.arange(256, dtype=torch.double) / 255
    parts = []
    for channels in pixels.split(256, 1):  # of a table there may be many
        counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in channels.unbind(1)]).cpu()
        weights = counts.double() / counts.sum(1, keepdim=True)
        mean = weights @ values
        std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
        constant = (counts > 0).sum(1) == 1  # must not divide by zero
        parts.append((mean.float(), torch.where(constant, 1.0, std).float()))
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, std


def stratified_split(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """``count`` examples with every class in its proportion (to one example), and the rest; any ``count`` of real targets."""
    order = torch.randperm(len(split), generator=seeds.generator("cpu", seed, "split"))
    labels = torch.zeros(len(order)) if split.targets.is_floating_point() else split.targets[order]
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
