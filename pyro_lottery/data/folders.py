"""Folders of image files as tensors, which are decoded once and then cached."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import torch
from torch import Tensor

from pyro_lottery import files, untrusted
from pyro_lottery.data import image_tree, images
from pyro_lottery.data.image_tree import Tree, shown
from pyro_lottery.data.images import Arrays, DecodedImage, Images
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.machine import memory

_RULES = 2
"""Version of the decoding; increased when the same files give other pixels, so that old caches are not used."""


def folder(root: Path, write: bool = True, image_size: int | None = None) -> Images:
    """Load the images ``root/{train,test}/CLASS/FILE``, which must have one size unless ``image_size`` is given.

    The decoded images are cached in ``root/pyro_lottery.safetensors`` (one file per ``image_size``) and used again while the
    image files hold the same bytes; without ``write``, no cache is written. Warnings name files that are not read and images
    that are not read as one might expect. Raises ``UserError`` if the folder is not a data set or an image is not readable.
    """
    tree = image_tree.read(root)
    tensors, notes = _decoded(root, tree, write, image_size)
    for note in (*tree.notes, *notes):
        warnings.warn(f"--data-dir {shown(root)}: {note}", stacklevel=2)
    return Images(*_arrays(tensors), tree.classes)


Decoded = tuple[dict[str, Tensor], list[str]]


def _decoded(root: Path, tree: Tree, write: bool, size: int | None) -> Decoded:
    cache = root / f"pyro_lottery{'' if size is None else f'_{size}'}.safetensors"
    stamp = _stamp(tree, size)
    try:
        return _read_cache(cache, stamp, len(tree.classes))
    except (OSError, Damaged):
        pass
    if not write:
        return _decode_all(tree, size)
    try:
        with filelock.FileLock(root / ".pyro_lottery.lock"):
            try:
                return _read_cache(cache, stamp, len(tree.classes))  # another process may have written it meanwhile
            except (FileNotFoundError, Damaged):
                tensors, notes = _decode_all(tree, size)
                # Measured: writing the cache takes three times the memory of the images, in addition to them.
                if 4 * sum(t.nbytes for t in tensors.values()) > memory():
                    warnings.warn(
                        f"there is too little memory to cache the images of {shown(root)}; they are decoded each time",
                        stacklevel=3,
                    )
                else:
                    files.save_tensors(cache, tensors, {"stamp": stamp, "notes": notes})
                return tensors, notes
    except OSError as error:  # for example a read-only folder or a full disk
        warnings.warn(
            f"{shown(cache)} cannot be written ({error.strerror}); the images are decoded each time", stacklevel=3
        )
        return _decode_all(tree, size)


def _stamp(tree: Tree, size: int | None) -> str:
    """Return a hash of the bytes and labels of all image files, in order.

    This takes 0.2 s for 10,000 small files in the page cache.
    """
    digest = hashlib.blake2b(f"{_RULES} {size} {len(tree.train)}".encode(), digest_size=16)
    for path, label in tree.files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "blake2b").digest()
        digest.update(content + label.to_bytes(4))
    return digest.hexdigest()


def _read_cache(cache: Path, stamp: str, classes: int) -> Decoded:
    tensors, info = untrusted.load_tensors(cache)
    if info.get("stamp") != stamp:
        raise Damaged("the images have changed")
    notes = info.get("notes")
    if not isinstance(notes, list) or not all(isinstance(note, str) and note.isprintable() for note in notes):
        raise Damaged(f"{cache} has no valid notes")
    try:
        arrays = _arrays(tensors)
    except KeyError as error:
        raise Damaged(f"{cache} lacks {error}") from error
    for pixels, labels in arrays:
        labelled = pixels.dtype == torch.uint8 and pixels.ndim == 4 and labels.shape == pixels.shape[:1] and len(labels)
        if not labelled or labels.dtype != torch.int64 or not bool(((labels >= 0) & (labels < classes)).all()):
            raise Damaged(f"{cache} has no valid images and labels")
    if arrays[0][0].shape[1:] != arrays[1][0].shape[1:]:
        raise Damaged(f"{cache} has images of two shapes")
    return tensors, notes


def _arrays(tensors: dict[str, Tensor]) -> tuple[Arrays, Arrays]:
    return (tensors["train/pixels"], tensors["train/labels"]), (tensors["test/pixels"], tensors["test/labels"])


def _decode_all(tree: Tree, size: int | None) -> Decoded:
    """Decode all images and return the pixels and labels of both parts, and notes for the user."""
    paths, labels = [path for path, _ in tree.files], torch.tensor([label for _, label in tree.files])
    with readable(paths[0]):
        shape = images.size_of(paths[0], size)
    images.check_memory(len(paths), (3, *shape))
    pixels = torch.empty((len(paths), 3, *shape), dtype=torch.uint8)
    traits, floats = Traits(), dict[int, Tensor]()
    for index, path in enumerate(paths):
        with readable(path):
            image = images.decode(path, size)
        height, width = image.values.shape[-2:]
        if (height, width) != shape:
            raise UserError(
                f"{shown(path)} has {width}×{height} pixels, but {shown(paths[0])} has {shape[1]}×{shape[0]}; give images of "
                "one size, or --image-size N to crop all of them to N×N"
            )
        traits.add(image)
        if image.extent is None:
            pixels[index] = image.values
        else:
            floats[index] = image.values
    for index, values in floats.items():
        pixels[index] = (values * (255 / traits.white())).round().clamp(0, 255).byte()
    pixels = pixels[:, :1].contiguous() if traits.grey else pixels
    count = len(tree.train)
    tensors = {
        "train/pixels": pixels[:count], "train/labels": labels[:count],
        "test/pixels": pixels[count:], "test/labels": labels[count:],
    }  # fmt: skip
    return tensors, traits.notes()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A context in which whatever a decoder raises becomes a ``UserError`` that names the file."""
    try:
        yield
    except Exception as error:  # decoders may raise anything for a file that is not a readable image
        raise UserError(
            f"{shown(path)} is not a readable image ({shown(one_line(error))}); repair or remove it"
        ) from error


class Traits:
    """Facts about all images of a folder, collected while they are decoded."""

    def __init__(self) -> None:
        self.grey = True
        self._transparent = self._frames = self._deep = self._floats = self._highest = 0
        self._low, self._high = math.inf, -math.inf

    def add(self, image: DecodedImage) -> None:
        """Add the facts about one image."""
        self.grey = self.grey and image.values.ndim == 2  # the data have one channel only if every image does
        self._transparent += image.transparent
        self._frames += image.frames
        if image.highest is not None:
            self._deep, self._highest = self._deep + 1, max(self._highest, image.highest)
        if image.extent is not None:
            low, high = image.extent
            finite = math.isfinite(low) and math.isfinite(high)
            self._low, self._high = (min(self._low, low), max(self._high, high)) if finite else (-math.inf, math.inf)
            self._floats += 1

    def white(self) -> int:
        """Return the value of white in float and 32-bit images: the smallest of 1, 255 and 65,535 that no value exceeds.

        Raises ``UserError`` if there is none.
        """
        for white in (1, 255, 65_535):
            if self._low >= 0 and self._high <= white:
                return white
        raise UserError(
            f"{self._range()}; expected 0 to 1, 0 to 255 or 0 to 65,535 in all of them; rescale them or save them with 8 bits"
        )

    def notes(self) -> list[str]:
        """Return notes for the user on images that are not read as one might expect."""
        notes = []
        if self._transparent:
            notes.append(f"transparency is ignored in {_images(self._transparent)}; the colours beneath are read")
        if self._frames:
            notes.append(f"only the first frame is read of {_images(self._frames)} with several frames")
        if self._deep and self._highest < 2**14:
            notes.append(
                f"{_images(self._deep)} of 16 bits with no value above {self._highest:,} will be dark, since white is 65,535"
            )
        if self._floats:
            notes.append(f"{self._range()}; {self.white():,} is read as white")
        return notes

    def _range(self) -> str:
        values = "are not all finite" if math.isinf(self._high) else f"range from {self._low:g} to {self._high:g}"
        have = "has" if self._floats == 1 else "have"
        return f"{_images(self._floats)} {have} float or 32-bit values, which {values}"


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
