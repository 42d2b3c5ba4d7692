"""Distribution shifts: corrupted test images, and images of another kind than those of the training."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyro_lottery import seeds
from pyro_lottery.data import sources
from pyro_lottery.data.batches import Split
from pyro_lottery.data.folders import readable
from pyro_lottery.data.images import decode, resize
from pyro_lottery.errors import UserError, one_line, unknown

SEVERITIES = range(1, 6)
_LEVELS = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, where pixels range from 0 to 1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor of the deviation from the mean of the channel
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # value from 0 to 1 added to the brightest channel, the V of HSV
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # factor of the side of the intermediate image
}
"""The parameter of each corruption at severities 1 to 5, as in CIFAR-10-C (Hendrycks and Dietterich 2019), whose operations these are too,
but for the border of blurred images, which is reflected here and repeated there."""
CORRUPTIONS = tuple(_LEVELS)
_FOLDERS = {"tiny_imagenet": "tiny-imagenet-200/test/images/*.JPEG", "textures": "dtd/images/*/*.jpg"}
"""Where archives of images lie when they are unpacked: Tiny ImageNet, and the Describable Textures Dataset."""
OOD = ("noise", "permuted", "svhn", "cifar100", *_FOLDERS)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _check_severity(severity: int) -> None:
    if not isinstance(severity, Integral) or severity not in SEVERITIES:
        raise UserError(f"severity must be 1 to 5, got {severity!r}")


def corrupt(split: Split, kind: str, severity: int) -> Split:
    """Return ``split`` with every image corrupted; the result is uint8 and always the same.

    ``kind`` is one of ``CORRUPTIONS`` and ``severity`` is 1 to 5. The parameters are chosen for images of 32×32 pixels; at
    8×8, some severities of ``pixelate`` have the same size. Raises ``UserError`` for another kind or severity, and for a
    split that does not hold uint8 images.
    """
    if kind not in _LEVELS:
        raise unknown("corruption", kind, CORRUPTIONS)
    _check_severity(severity)
    from torchvision.transforms.v2 import functional as F  # torchvision takes a second to import

    level, pixels = _LEVELS[kind][severity - 1], _pixels(split)
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=seeds.generator("cpu", 0, "corrupt"))
        changed = pixels.float() + 255 * level * noise.to(pixels.device)
    elif kind == "blur":
        width = min(7, 2 * min(pixels.shape[-2:]) - 1)  # a wider kernel cannot be padded
        changed = F.gaussian_blur(pixels.float(), [width, width], [level, level])
    elif kind == "contrast":
        mean = pixels.float().mean((2, 3), keepdim=True)
        changed = mean + level * (pixels.float() - mean)
    elif kind == "brightness":
        value = pixels.float().amax(1, keepdim=True)
        brighter = (value + 255 * level).clamp_max(255)
        changed = torch.where(value > 0, pixels.float() * brighter / value.clamp_min(1), brighter)
    else:
        changed = _pixelated(pixels, level).float()
    return _like(split, changed.round().clamp(0, 255).to(torch.uint8))


def _pixelated(pixels: Tensor, level: float) -> Tensor:
    """Images [n, channels, height, width] shrunk and enlarged by Pillow's box filter, as in CIFAR-10-C."""
    height, width = pixels.shape[-2:]
    small, box = (max(1, int(level * width)), max(1, int(level * height))), Image.Resampling.BOX
    planes = (Image.fromarray(plane) for plane in pixels.cpu().flatten(0, 1).numpy())
    found = np.stack([np.asarray(plane.resize(small, box).resize((width, height), box)) for plane in planes])
    return torch.from_numpy(found).view(pixels.shape).to(pixels.device)


def out_of_distribution(test: Split, name: str, data_dir: str | Path, image_size: int | None = None) -> Split:
    """Return images of another kind than ``test``, with the same shape and normalisation; their labels have no meaning.

    ``name`` is ``noise`` (uniform pixels), ``permuted`` (the test images, the pixels of each permuted at random), ``svhn`` or
    ``cifar100`` (their test images, which must be in ``data_dir``; resized if the run uses ``image_size``), ``tiny_imagenet`` or ``textures`` (the
    unpacked archives ``tiny-imagenet-200`` and ``dtd`` in ``data_dir``; every image is resized to those of the run, its centre cropped). There are as many
    images as in ``test``, or fewer if the other set is smaller. Raises ``UserError`` for another name, a missing copy,
    and images of another shape.
    """
    generator, pixels = seeds.generator("cpu", 0, "ood", name), _pixels(test)
    if name == "noise":
        return _like(test, torch.randint(0, 256, pixels.shape, dtype=torch.uint8, generator=generator))
    if name == "permuted":
        flat = pixels.cpu().flatten(2)
        order = torch.rand((len(flat), 1, flat.shape[2]), generator=generator).argsort(2).expand_as(flat)
        return _like(test, flat.gather(2, order).view(pixels.shape))
    if name not in OOD:
        raise unknown("--ood", name, OOD)
    if name in _FOLDERS:
        return _like(test, _unpacked(name, Path(data_dir), pixels))
    others = sources.present(name.upper(), Path(data_dir))[: len(pixels)]
    if image_size is not None and others.shape[-2:] != (image_size, image_size):
        others = resize(others, image_size)
    if others.shape[1:] != pixels.shape[1:]:
        raise UserError(
            f"--ood {name} has images of shape {tuple(others.shape[1:])}, but those of the run have "
            f"{tuple(pixels.shape[1:])}; choose another of {' '.join(OOD)}"
        )
    return _like(test, others)


def _unpacked(name: str, root: Path, like: Tensor) -> Tensor:
    """Images [n, 3, size, size] of an unpacked archive, spread evenly over its files in the order of their names."""
    paths = sorted(root.glob(_FOLDERS[name]))
    if not paths:
        raise UserError(
            f"--ood {name}: there is no {_FOLDERS[name]} in {root}; unpack the archive there or leave it out"
        )
    if like.shape[1] != 3 or like.shape[2] != like.shape[3]:
        raise UserError(
            f"--ood {name} has square colour images, but those of the run are {tuple(like.shape[1:])}; leave it out"
        )
    count = min(len(paths), len(like))
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    images = []
    for path in chosen:
        with readable(path):
            images.append(decode(path, like.shape[-1]).values)
    return torch.stack([image if image.ndim == 3 else image.expand(3, -1, -1) for image in images])


def cifar10_c(root: str | Path) -> tuple[str, ...]:
    """The corruptions whose images are in ``root``/CIFAR-10-C, in the order of their names; none if there is no such folder."""
    folder = Path(root) / "CIFAR-10-C"
    return tuple(sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels"))


def from_cifar10_c(test: Split, root: str | Path, kind: str, severity: int) -> Split:
    """The first images of CIFAR-10-C (Hendrycks and Dietterich 2019) of a ``kind`` and ``severity`` from 1 to 5, with their labels; as many as in ``test``, at most 10,000.

    With a test set that was made smaller they are other images than its own. Raises ``UserError`` for another severity, files of other
    shapes, and images of another size.
    """
    _check_severity(severity)
    folder, pixels = Path(root) / "CIFAR-10-C", _pixels(test)
    if pixels.shape[1:] != (3, 32, 32):
        raise UserError(f"{folder} has images of 3×32×32, but those of the run are {tuple(pixels.shape[1:])}")
    try:
        images, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in (kind, "labels"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {kind}.npy or labels.npy is missing or damaged ({one_line(error)})") from error
    if images.shape != (50_000, 32, 32, 3) or images.dtype != np.uint8 or labels.shape != (50_000,):
        raise UserError(
            f"{folder}: expected {kind}.npy of uint8 [50000, 32, 32, 3] and labels.npy of [50000], got {images.dtype} {images.shape} and {labels.shape}"
        )
    start = 10_000 * (severity - 1)
    part = slice(start, start + min(10_000, len(pixels)))
    chosen = torch.from_numpy(np.array(images[part])).permute(0, 3, 1, 2).contiguous()
    return Split(
        chosen.to(pixels.device), torch.from_numpy(np.array(labels[part])).long().to(pixels.device), test.mean, test.std
    )


def _pixels(split: Split) -> Tensor:
    if split.inputs.dtype != torch.uint8 or split.inputs.ndim != 4:
        raise UserError(
            f"shifts need uint8 images [n, channels, height, width], but these inputs are {split.inputs.dtype} "
            f"{list(split.inputs.shape)}"
        )
    return split.inputs


def _like(split: Split, pixels: Tensor) -> Split:
    labels = split.labels[: len(pixels)]
    return Split(pixels.to(split.pixels.device), labels, split.mean, split.std)
