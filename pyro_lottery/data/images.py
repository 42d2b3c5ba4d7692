"""Decoding image files and resizing images to uint8 pixels of one size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.machine import memory

Arrays = tuple[Tensor, Tensor]
"""uint8 pixels [n, c, h, w] and int64 labels [n]."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""Formats that Pillow decodes itself. For others it may start programs: an EPS file named .png would run Ghostscript."""
PIXELS = 2**24
"""Largest number of pixels of an image that is decoded at its own size, 4,096×4,096."""
RESIZED_PIXELS = 2**26
"""Largest number of pixels of an image that is then resized, 8,192×8,192."""

SIDES = range(1, 2049)
"""Sizes in pixels to which images can be resized."""


class Images(NamedTuple):
    """Training and test images of a source, with their labels."""

    train: Arrays
    test: Arrays
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels, or None if they are unknown."""

    def resized(self, size: int | None) -> Images:
        """Return all images resized by :func:`crop` to size×size, or unchanged if ``size`` is None."""
        if size is None or self.train[0].shape[-2:] == (size, size):
            return self
        check_memory(len(self.train[0]) + len(self.test[0]), (self.train[0].shape[1], size, size))
        (train, labels), (test, test_labels) = self.train, self.test
        return Images((resize(train, size), labels), (resize(test, size), test_labels), self.classes)


class DecodedImage(NamedTuple):
    """A decoded image file, with the facts that the user should be told about."""

    values: Tensor
    """uint8 [h, w] for grey images, [3, h, w] for colours; float32 [h, w] if the file does not define which value is white."""
    highest: int | None = None
    """Largest value in a 16-bit file, before scaling to 8 bits."""
    extent: tuple[float, float] | None = None
    """Smallest and largest value in a file of float values."""
    transparent: bool = False
    """Whether some pixels are transparent; their colours are read and transparency is ignored."""
    frames: bool = False
    """Whether the file has several frames; the first one is read."""


def check_memory(count: int, shape: tuple[int, ...]) -> None:
    """Raise ``UserError`` if ``count`` uint8 images of ``shape`` do not fit into memory."""
    needed, here = count * int(np.prod(shape, dtype=np.int64)), memory()
    if needed > here:
        raise UserError(
            f"{count:,} images of {'×'.join(map(str, shape))} need {needed / 2**30:,.1f} GiB of memory, but there are "
            f"{here / 2**30:,.1f} GiB; use fewer images, or smaller ones with --image-size"
        )


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize uint8 images [n, c, h, w] to [n, c, size, size] with :func:`crop`."""
    resized = torch.empty((*pixels.shape[:2], size, size), dtype=torch.uint8)
    for image, out in zip(pixels.flatten(0, 1), resized.flatten(0, 1), strict=True):
        out.copy_(torch.from_numpy(np.array(crop(Image.fromarray(image.numpy()), size))))
    return resized


def crop(image: Image.Image, size: int) -> Image.Image:
    """Resize an image so that its shorter side has ``size`` pixels, and return its centre, size×size.

    Interpolation is bilinear with antialiasing. The pixels equal those of torchvision's ``Resize`` and ``CenterCrop`` for a
    Pillow image whose longer side is at most 16 times the shorter one; of a longer one, only the middle is read.
    """
    short = min(image.size)
    # Of a very long image, only the middle is resized: the rest would be cut off anyway.
    image = _centre(image, *(min(side, 16 * short) for side in image.size))
    sides = [size if side == short else int(size * side / short) for side in image.size]
    return _centre(image.resize((sides[0], sides[1]), Image.Resampling.BILINEAR), size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def size_of(path: Path, size: int | None = None) -> tuple[int, int]:
    """Return the height and width of the image that :func:`decode` returns, without decoding the file."""
    if size is not None:
        return size, size
    with _opened(path, size) as image:
        width, height = image.size
        rotated = _orientation(image) >= 5 and image.format != "TIFF"  # Pillow has already swapped the sides of a TIFF
        return (width, height) if rotated else (height, width)


def decode(path: Path, size: int | None = None) -> DecodedImage:
    """Read an image file, rotate it as its EXIF data say, and crop it to size×size if ``size`` is given.

    Decoders raise many types of exceptions; each of them means that the file is not a readable image.
    """
    with _opened(path, size) as image:
        several = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # MPO: a photo and its preview
        image.seek(0)
        try:
            image.load()
        except OSError as error:
            raise ValueError("the file is truncated" if "truncated" in str(error) else one_line(error)) from error
        if _orientation(image) > 1:
            ImageOps.exif_transpose(image, in_place=True)
        return _values(image, size)._replace(transparent=_is_transparent(image), frames=several)


def _values(image: Image.Image, size: int | None) -> DecodedImage:
    highest = extent = None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # scaled to 16 bits
        deep = np.array(image).astype(np.uint32)
        highest = int(deep.max())
        plain = Image.fromarray(((deep + 128) // 257).astype(np.uint8))  # 65,535 is white
    elif image.mode in ("I", "F"):
        floats = np.array(image).astype(np.float32)
        extent = float(floats.min()), float(floats.max())
        plain = Image.fromarray(floats)
    else:
        plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    pixels = torch.from_numpy(np.array(plain if size is None else crop(plain, size)))
    return DecodedImage(pixels if pixels.ndim == 2 else pixels.permute(2, 0, 1), highest, extent)


@contextmanager
def _opened(path: Path, size: int | None) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about palettes and metadata
        # A small file may decode to gigabytes. Pillow refuses sizes above its own limit; smaller ones are checked below.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        most = PIXELS if size is None else RESIZED_PIXELS
        try:
            opened = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(_what_else(path)) from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"it has more than {most:,} pixels") from None
        with opened as image:
            if (count := image.width * image.height) > most:
                hint = "; --image-size N reads larger ones" if count <= RESIZED_PIXELS else ""
                raise ValueError(f"it has {image.width}×{image.height} pixels, more than {most:,}{hint}")
            yield image


def _what_else(path: Path) -> str:
    """Return why a file with the suffix of an image is not one."""
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        return "the file is empty"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run git lfs pull to fetch the image"
    return f"it is none of {', '.join(FORMATS)}"


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # damaged EXIF data do not affect the pixels
        found = image.getexif().get(0x0112, 1)
        return found if found in range(1, 9) else 1
    return 1


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    alpha = image if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") else image.convert("RGBA")
    return bool(np.array(alpha.getchannel(alpha.getbands()[-1])).min() < 255)
