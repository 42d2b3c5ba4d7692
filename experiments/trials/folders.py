"""Builds small folders of images with one thing unusual in each. A function without a path returns a builder."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pyro_lottery as pl

Build = Callable[[Path], object]
"""Makes the content of an empty folder."""


def plain(root: Path) -> Path:
    """Two classes of two training images and one test image, 2×2 pixels of one grey each, as colours."""
    for part, grey in (("train/cat", 10), ("train/cat", 20), ("train/dog", 30), ("train/dog", 40)):
        save(root / part / f"{grey}.png", grey)
    for part, grey in (("test/cat", 50), ("test/dog", 60)):
        save(root / part / f"{grey}.png", grey)
    return root


def save(path: Path, what: Any, mode: str = "RGB", size: tuple[int, int] = (2, 2), **options: Any) -> Path:
    """Save one grey or colour, or an array, as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(what, np.ndarray | Image.Image):
        what = Image.new(mode, size, (what,) * 3 if mode == "RGB" and isinstance(what, int) else what)
    image = Image.fromarray(what) if isinstance(what, np.ndarray) else what
    image.save(path, **options)
    return path


def with_(change: Build) -> Build:
    """The plain folder with a change."""
    return lambda root: change(plain(root))


def other(what: Any, mode: str = "RGB", suffix: str = ".png", **options: Any) -> Build:
    """The plain folder with another first image."""

    def build(root: Path) -> None:
        plain(root)
        (root / "train/cat/10.png").unlink()
        save(root / f"train/cat/10{suffix}", what, mode, **options)

    return build


def every(what: Callable[[int], Any], suffix: str = ".png", **options: Any) -> Build:
    """The plain folder with each image made from its grey."""

    def build(root: Path) -> None:
        for path in sorted(plain(root).rglob("*.png")):
            path.unlink()
            save(path.with_suffix(suffix), what(int(path.stem)), **options)

    return build


def first(content: bytes) -> Build:
    """The plain folder whose first image file holds other bytes."""
    return with_(lambda root: (root / "train/cat/10.png").write_bytes(content))


def first_half(suffix: str) -> Build:
    """The plain folder whose first image file is cut to half its size."""

    def build(root: Path) -> None:
        content = save(plain(root) / f"noise{suffix}", NOISE).read_bytes()
        (root / "train/cat/10.png").write_bytes(content[: len(content) // 2])

    return build


def beside(path: str) -> Build:
    """The plain folder with one more image."""
    return with_(lambda root: save(root / path, 99, format="PNG"))


def text_beside(*paths: str) -> Build:
    """The plain folder with files of text."""

    def change(root: Path) -> None:
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("text")

    return with_(change)


def link(path: str, to: str) -> Build:
    """The plain folder with a symbolic link."""
    return with_(lambda root: (root / path).symlink_to(to))


def moved(path: str, to: str) -> Build:
    """The plain folder with one thing moved."""

    def change(root: Path) -> None:
        (root / to).parent.mkdir(parents=True, exist_ok=True)
        (root / path).rename(root / to)

    return with_(change)


def after_reading(change: Build, image_size: int | None = None) -> Build:
    """The plain folder, changed after it was read once, which stores the decoded images in it."""

    def build(root: Path) -> None:
        pl.data.load("folder", plain(root), image_size=image_size)
        change(root)

    return build


def like_before(path: Path, content: bytes) -> None:
    """Write ``content`` of the same size into ``path``, and keep the file's time."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(root: Path) -> None:
    """Swap two images of two classes; each path keeps its size and time."""
    one, two = root / "train/cat/10.png", root / "train/dog/40.png"
    content = one.read_bytes()
    like_before(one, two.read_bytes())
    like_before(two, content)


def tiny_imagenet(lines: str) -> Build:
    """The folders of Tiny ImageNet, whose test images have no labels."""

    def build(root: Path) -> None:
        for name, greys in (("n01", (10, 20)), ("n02", (30, 40))):
            for grey in greys:
                save(root / f"train/{name}/images/{name}_{grey}.JPEG", grey, quality=100)
            (root / f"train/{name}/{name}_boxes.txt").write_text("boxes")
        for grey in (50, 60):
            save(root / f"val/images/val_{grey}.JPEG", grey, quality=100)
        save(root / "test/images/test_0.JPEG", 70)
        (root / "val/val_annotations.txt").write_text(lines)

    return build


def png16(*colours: int) -> bytes:
    """A PNG of 2×2 pixels with three channels of 16 bits, which Pillow can read but not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">3H", *colours) * 2
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def array(dtype: Any, values: Callable[[int], Any] = lambda grey: grey) -> Callable[[int], np.ndarray]:
    """Makes an image of one value from a grey."""
    return lambda grey: np.full((2, 2), values(grey), dtype=dtype)


def turned(orientation: int) -> Image.Exif:
    """EXIF data with this orientation of the camera."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


STEPS = np.array([[0, 50], [100, 150]], dtype=np.uint8)
"""Four pixels that show how an image was turned."""
WIDE = np.array([[0, 90, 90, 200]] * 2, dtype=np.uint8)
"""Two rows of four pixels."""
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n{} loop\n%%EOF\n"
GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def frames(*greys: int) -> dict[str, Any]:
    """Options to save more frames, of these greys."""
    return {"save_all": True, "append_images": [Image.new("L", (2, 2), grey) for grey in greys]}


def pgm(values: Sequence[int], maximum: int) -> bytes:
    """A PGM file of 2×2 pixels whose white is ``maximum``."""
    kind = ">u2" if maximum > 255 else "u1"
    return f"P5 2 2 {maximum}\n".encode() + np.array(values, dtype=kind).tobytes()
