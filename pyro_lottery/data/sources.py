"""Where images come from: torchvision's downloads, scikit-learn's digits, and trees of image files."""

from __future__ import annotations

import http.client
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyro_lottery import files
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.kernels import memory

Arrays = tuple[Tensor, Tensor]
"""uint8 pixels [n, c, h, w] and int64 labels [n]."""

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""Those that Pillow reads by itself: an EPS under the name of a PNG would be run by Ghostscript."""
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
PIXELS = 2**24
"""The most pixels of an image that is decoded: 4,096×4,096."""
_NO_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def digits(_: Path, write: bool = True) -> tuple[Arrays, Arrays]:
    """The 1,797 8×8 digits that scikit-learn ships; every fifth of a fixed shuffle is the test set (360)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[::5], order[torch.arange(len(order)) % 5 != 0]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def torchvision_source(name: str, archive: str) -> Callable[[Path, bool], tuple[Arrays, Arrays]]:
    """A loader for one of torchvision's data sets; ``archive`` is the file that a user without network must bring."""

    def load(root: Path, write: bool = True) -> tuple[Arrays, Arrays]:
        try:
            try:  # without the lock, so that a read-only copy will do
                return _split(name, root, True), _split(name, root, False)
            except RuntimeError:
                if not write:
                    raise
                root.mkdir(parents=True, exist_ok=True)
                # Jobs started together wait here: the first downloads, torchvision checks the hash, the others read.
                with filelock.FileLock(root / f".{name}.lock"):
                    return _split(name, root, True, download=True), _split(name, root, False, download=True)
        except (*_NO_NETWORK, RuntimeError) as error:
            raise UserError(
                f"--dataset {name.lower()}: {root} holds no complete copy and the download failed ({error}); "
                f"put {archive} there, or try --dataset digits, which needs no download"
            ) from error

    return load


def _split(name: str, root: Path, train: bool, download: bool = False) -> Arrays:
    import torchvision

    # A copy that is there is checked by its hash; even with download=True it never touches the network.
    which = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    dataset = getattr(torchvision.datasets, name)(root, download=download, **which)
    pixels = torch.from_numpy(np.asarray(dataset.data))
    labels = dataset.labels if name == "SVHN" else dataset.targets
    if name != "SVHN":  # SVHN is stored with channels first
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64)


def present(name: str, root: Path) -> Tensor:
    """The test images of one of torchvision's data sets where a copy is in ``root``; ``UserError`` where none is."""
    try:
        return _split(name, root, False)[0]
    except RuntimeError as error:
        raise UserError(f"{root} holds no complete copy of {name} ({error}); put one there, or leave it out") from error


def folder(root: Path, write: bool = True) -> tuple[Arrays, Arrays]:
    """An ImageFolder tree ``root/{train,test}/CLASS/FILE`` of equally large images, decoded once.

    The decoded tensors are kept beside it in ``root/pyro_lottery.safetensors`` and used again while the names,
    sizes and times of the image files stay the same.
    """
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise UserError(
                f"--data-dir {root}: no folder {part}/ in it; --dataset folder reads train/CLASS/FILE and test/CLASS/FILE"
            )
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    found = {part: _files(root / part, classes) for part in ("train", "test")}
    stamp = files.fingerprint(path for part in found.values() for path, _ in part)
    cache = root / "pyro_lottery.safetensors"
    try:
        return _read_cache(cache, stamp, len(classes))
    except (OSError, Damaged):
        pass
    if not write:
        return _arrays(_decode_all(root, found))
    try:
        with filelock.FileLock(root / ".pyro_lottery.lock"):
            try:
                return _read_cache(cache, stamp, len(classes))  # another job may have decoded it meanwhile
            except (FileNotFoundError, Damaged):
                tensors = _decode_all(root, found)
                files.save_tensors(cache, tensors, {"stamp": stamp})
    except OSError as error:  # a read-only folder, a full disk
        warnings.warn(
            f"{cache} cannot be written ({error.strerror}); the images are decoded anew each time", stacklevel=2
        )
        tensors = _decode_all(root, found)
    return _arrays(tensors)


def _read_cache(cache: Path, stamp: str, classes: int) -> tuple[Arrays, Arrays]:
    tensors, info = files.load_tensors(cache)
    if info != {"stamp": stamp}:
        raise Damaged("the images have changed")
    try:
        arrays = _arrays(tensors)
    except KeyError as error:
        raise Damaged(f"{cache} lacks {error}") from error
    for pixels, labels in arrays:
        images = pixels.dtype == torch.uint8 and pixels.ndim == 4 and labels.shape == pixels.shape[:1] and len(labels)
        if not images or labels.dtype != torch.int64 or not bool(((labels >= 0) & (labels < classes)).all()):
            raise Damaged(f"{cache} holds no labelled images")
    if arrays[0][0].shape[1:] != arrays[1][0].shape[1:]:
        raise Damaged(f"{cache} holds images of two shapes")
    return arrays


def _arrays(tensors: dict[str, Tensor]) -> tuple[Arrays, Arrays]:
    return (tensors["train/pixels"], tensors["train/labels"]), (tensors["test/pixels"], tensors["test/labels"])


def _files(part: Path, classes: list[str]) -> list[tuple[Path, int]]:
    others = sorted(p.name for p in part.iterdir() if p.is_dir() and p.name not in classes)
    if others:
        raise UserError(f"{part / others[0]} is a class that train/ does not have; both need the same class folders")
    listed = [
        (path, label)
        for label, name in enumerate(classes)
        for path in (sorted((part / name).iterdir()) if (part / name).is_dir() else [])
        if path.suffix.lower() in _SUFFIXES
    ]
    if not listed:
        raise UserError(f"{part} holds no images; expected {part}/CLASS/FILE with one of {' '.join(sorted(_SUFFIXES))}")
    return listed


def _decode_all(root: Path, found: dict[str, list[tuple[Path, int]]]) -> dict[str, Tensor]:
    tensors, grey = {}, True
    for part, listed in found.items():
        tensors[f"{part}/pixels"], part_grey = _decode([path for path, _ in listed])
        tensors[f"{part}/labels"] = torch.tensor([label for _, label in listed])
        grey = grey and part_grey
    if tensors["train/pixels"].shape[1:] != tensors["test/pixels"].shape[1:]:
        raise UserError(f"--data-dir {root}: images in train/ and test/ differ in size; all must be equally large")
    if grey:  # one channel only where every image has one
        for part in found:
            tensors[f"{part}/pixels"] = tensors[f"{part}/pixels"][:, :1].contiguous()
    return tensors


def _decode(paths: list[Path]) -> tuple[Tensor, bool]:
    pixels, grey = None, True
    for index, path in enumerate(paths):
        try:
            array, one_channel = _decode_one(path)
        except Exception as error:  # decoders fail in many ways; each means that this file is no image
            raise UserError(f"{path} is not a readable image ({one_line(error)}); repair or remove it") from error
        grey = grey and one_channel
        if pixels is None:
            if (needed := len(paths) * array.numel()) > (here := memory()):
                raise UserError(
                    f"{len(paths)} images like {path} take {needed / 2**30:,.1f} GiB, and there are {here / 2**30:,.1f} GiB"
                )
            pixels = torch.empty((len(paths), *array.shape), dtype=torch.uint8)
        if array.shape != pixels.shape[1:]:
            raise UserError(
                f"{path} is {array.shape[2]}×{array.shape[1]} pixels, but {paths[0]} is "
                f"{pixels.shape[3]}×{pixels.shape[2]}; all images must be equally large"
            )
        pixels[index] = array
    assert pixels is not None
    return pixels, grey


def _decode_one(path: Path) -> tuple[Tensor, bool]:
    with warnings.catch_warnings():
        # A small file may decode to gigabytes. Pillow says so when it opens one, and below its limit the size is known.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if not path.is_file():
            raise ValueError("not a regular file")
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels, more than {PIXELS:,}")
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            return pixels, image.mode in ("1", "L")
