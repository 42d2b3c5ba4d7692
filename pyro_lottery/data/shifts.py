"""Distribution shifts: corrupted test images, and images of another kind than those of the training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyro_lottery import seeds
from pyro_lottery.data import sources
from pyro_lottery.data.batches import Split
from pyro_lottery.data.images import resize
from pyro_lottery.errors import UserError, unknown

SEVERITIES = range(1, 6)
_LEVELS = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, where pixels range from 0 to 1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor of the deviation from the mean grey
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # value added to pixels from 0 to 1
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # factor of the side of the intermediate image
}
"""The parameter of each corruption at severities 1 to 5, as in CIFAR-10-C (Hendrycks and Dietterich 2019)."""
CORRUPTIONS = tuple(_LEVELS)
OOD = ("noise", "permuted", "svhn", "cifar100")


def corrupt(split: Split, kind: str, severity: int) -> Split:
    """Return ``split`` with every image corrupted; the result is uint8 and always the same.

    ``kind`` is one of ``CORRUPTIONS`` and ``severity`` is 1 to 5. The parameters are chosen for images of 32×32 pixels; at
    8×8, some severities of ``pixelate`` round to the same size. Raises ``UserError`` for another kind or severity, and for a
    split that does not hold uint8 images.
    """
    if kind not in _LEVELS:
        raise unknown("corruption", kind, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"severity must be 1 to 5, got {severity}")
    from torchvision.transforms.v2 import functional as F  # torchvision takes a second to import

    level, pixels = _LEVELS[kind][severity - 1], _pixels(split)
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=seeds.generator("cpu", 0, "corrupt"))
        changed = pixels.float() + 255 * level * noise.to(pixels.device)
    elif kind == "blur":
        width = min(7, 2 * min(pixels.shape[-2:]) - 1)  # a wider kernel cannot be padded
        changed = F.gaussian_blur(pixels.float(), [width, width], [level, level])
    elif kind == "contrast":
        changed = F.adjust_contrast(pixels, level).float()
    elif kind == "brightness":
        changed = pixels.float() + 255 * level
    else:
        size = list(pixels.shape[-2:])
        small = F.resize(pixels, [max(1, round(level * s)) for s in size], antialias=True)
        changed = F.resize(small, size, interpolation=F.InterpolationMode.NEAREST).float()
    return _like(split, changed.round().clamp(0, 255).to(torch.uint8))


def out_of_distribution(test: Split, name: str, data_dir: str | Path, image_size: int | None = None) -> Split:
    """Return images of another kind than ``test``, with the same shape and normalisation; their labels have no meaning.

    ``name`` is ``noise`` (uniform pixels), ``permuted`` (the test images, the pixels of each permuted at random), ``svhn`` or
    ``cifar100`` (their test images, which must be in ``data_dir``; resized if the run uses ``image_size``). There are as many
    images as in ``test``, or fewer if the other test set is smaller. Raises ``UserError`` for another name, a missing copy,
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
    others = sources.present(name.upper(), Path(data_dir))[: len(pixels)]
    if image_size is not None and others.shape[-2:] != (image_size, image_size):
        others = resize(others, image_size)
    if others.shape[1:] != pixels.shape[1:]:
        raise UserError(
            f"--ood {name} has images of shape {tuple(others.shape[1:])}, but those of the run have "
            f"{tuple(pixels.shape[1:])}; choose another of {' '.join(OOD)}"
        )
    return _like(test, others)


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
