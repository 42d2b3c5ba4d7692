"""Image files and arrays of images as uint8 pixels of one size."""

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
"""Those that Pillow reads by itself: an EPS under the name of a PNG would be run by Ghostscript."""
PIXELS = 2**24
"""The most pixels of an image that is decoded as it is, 4,096×4,096."""
RESIZED_PIXELS = 2**26
"""The most of one that is made smaller on the way, 8,192×8,192."""

SIDES = range(1, 2049)
"""What images can be resized to."""


class Images(NamedTuple):
    """What a source of images gives."""

    train: Arrays
    test: Arrays
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels."""

    def resized(self, size: int | None) -> Images:
        """All images as size×size, as :func:`crop` makes them."""
        if size is None or self.train[0].shape[-2:] == (size, size):
            return self
        check_memory(len(self.train[0]) + len(self.test[0]), (self.train[0].shape[1], size, size))
        (train, labels), (test, test_labels) = self.train, self.test
        return Images((resize(train, size), labels), (resize(test, size), test_labels), self.classes)


class Picture(NamedTuple):
    """A decoded image file."""

    values: Tensor
    """uint8 [h, w] if it is grey, [3, h, w] if it has colours; float32 [h, w] if its file does not say which value is white."""
    highest: int | None = None
    """Of the values of a file of 16 bits, before they were scaled to 8."""
    extent: tuple[float, float] | None = None
    """Lowest and highest of float values, in the file."""
    transparent: bool = False
    """Whether some of it is; the colours beneath are read."""
    frames: bool = False
    """Whether there are several, of which the first is read."""


def check_memory(count: int, shape: tuple[int, ...]) -> None:
    """Raise ``UserError`` where ``count`` images of ``shape`` do not fit into memory."""
    needed, here = count * int(np.prod(shape, dtype=np.int64)), memory()
    if needed > here:
        raise UserError(
            f"{count:,} images of {'×'.join(map(str, shape))} take {needed / 2**30:,.1f} GiB, and there are "
            f"{here / 2**30:,.1f} GiB; use fewer, or smaller ones by --image-size"
        )


def resize(pixels: Tensor, size: int) -> Tensor:
    """uint8 images [n, c, h, w] as [n, c, size, size], as :func:`crop` makes them."""
    resized = torch.empty((*pixels.shape[:2], size, size), dtype=torch.uint8)
    for image, out in zip(pixels.flatten(0, 1), resized.flatten(0, 1), strict=True):
        out.copy_(torch.from_numpy(np.array(crop(Image.fromarray(image.numpy()), size))))
    return resized


def crop(image: Image.Image, size: int) -> Image.Image:
    """The centre, size×size, of an image whose shorter side is made ``size`` pixels long, bilinearly and without aliasing.

    The pixels are those of torchvision's ``Resize`` and ``CenterCrop`` of an image that Pillow holds.
    """
    short = min(image.size)
    image = _centre(image, *(min(side, 16 * short) for side in image.size))  # of a line, most would be resized in vain
    sides = [size if side == short else int(size * side / short) for side in image.size]
    return _centre(image.resize((sides[0], sides[1]), Image.Resampling.BILINEAR), size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def size_of(path: Path, size: int | None = None) -> tuple[int, int]:
    """Height and width that :func:`decode` gives an image, from the beginning of its file."""
    if size is not None:
        return size, size
    with _opened(path, size) as image:
        width, height = image.size
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # whose size Pillow has turned already
        return (width, height) if turned else (height, width)


def decode(path: Path, size: int | None = None) -> Picture:
    """Read an image file, turned as its EXIF data say, and cropped to size×size if that is given.

    Any exception means that this file is no image: decoders fail in many ways.
    """
    with _opened(path, size) as image:
        several = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # a photo and its preview
        image.seek(0)
        try:
            image.load()
        except OSError as error:
            raise ValueError("the file is truncated" if "truncated" in str(error) else one_line(error)) from error
        if _orientation(image) > 1:
            ImageOps.exif_transpose(image, in_place=True)
        return _picture(image, size)._replace(transparent=_is_transparent(image), frames=several)


def _picture(image: Image.Image, size: int | None) -> Picture:
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
    return Picture(pixels if pixels.ndim == 2 else pixels.permute(2, 0, 1), highest, extent)


@contextmanager
def _opened(path: Path, size: int | None) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says of palettes and metadata
        # A small file may decode to gigabytes. Pillow says so when it opens one, and below its limit the size is known.
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
                raise ValueError(f"{image.width}×{image.height} pixels, more than {most:,}{hint}")
            yield image


def _what_else(path: Path) -> str:
    """Why a file whose name is that of an image is none."""
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        return "the file is empty"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; git lfs pull fetches the image"
    return f"cannot identify it as any of {', '.join(FORMATS)}"


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # damaged EXIF data say nothing of the pixels
        found = image.getexif().get(0x0112, 1)
        return found if found in range(1, 9) else 1
    return 1


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    alpha = image if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") else image.convert("RGBA")
    return bool(np.array(alpha.getchannel(alpha.getbands()[-1])).min() < 255)
