"""Where images come from: torchvision's downloads, scikit-learn's digits, and trees of image files."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pyro_lottery import files
from pyro_lottery.errors import Damaged, UserError

Arrays = tuple[Tensor, Tensor]
"""uint8 pixels [n, c, h, w] and int64 labels [n]."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
_NO_NETWORK = (urllib.error.URLError, ConnectionError, TimeoutError)


def digits(_: Path) -> tuple[Arrays, Arrays]:
    """The 1,797 8×8 digits that scikit-learn ships; every fifth of a fixed shuffle is the test set (360)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[::5], order[torch.arange(len(order)) % 5 != 0]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def torchvision_source(name: str, archive: str) -> Callable[[Path], tuple[Arrays, Arrays]]:
    """A loader for one of torchvision's data sets; ``archive`` is the file that a user without network must bring."""

    def load(root: Path) -> tuple[Arrays, Arrays]:
        import torchvision

        kind = getattr(torchvision.datasets, name)

        def split(train: bool) -> Arrays:
            which = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
            try:  # an existing copy is checked by its hash and never touches the network
                dataset = kind(root, download=False, **which)
            except RuntimeError:
                dataset = kind(root, download=True, **which)
            pixels = torch.from_numpy(np.asarray(dataset.data))
            labels = dataset.labels if name == "SVHN" else dataset.targets
            if name != "SVHN":  # SVHN is stored with channels first
                pixels = pixels.permute(0, 3, 1, 2)
            return pixels.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64)

        try:
            root.mkdir(parents=True, exist_ok=True)
            # Jobs started together wait here: the first downloads, torchvision checks the hash, the others read.
            with filelock.FileLock(root / f".{name}.lock"):
                return split(True), split(False)
        except (*_NO_NETWORK, RuntimeError) as error:
            raise UserError(
                f"--dataset {name.lower()}: {root} holds no complete copy and the download failed ({error}); "
                f"put {archive} there, or try --dataset digits, which needs no download"
            ) from error

    return load


def folder(root: Path) -> tuple[Arrays, Arrays]:
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
    with filelock.FileLock(root / ".pyro_lottery.lock"):
        try:
            tensors, info = files.load_tensors(cache)
            if info != {"stamp": stamp}:
                raise Damaged("the images have changed")
        except (FileNotFoundError, Damaged):
            tensors = {}
            for part, listed in found.items():
                tensors[f"{part}/pixels"] = _decode([path for path, _ in listed])
                tensors[f"{part}/labels"] = torch.tensor([label for _, label in listed])
            if tensors["train/pixels"].shape[1:] != tensors["test/pixels"].shape[1:]:
                raise UserError(f"--data-dir {root}: images in train/ and test/ differ in size") from None
            files.save_tensors(cache, tensors, {"stamp": stamp})
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


def _decode(paths: list[Path]) -> Tensor:
    first = paths[0]
    mode = "RGB"
    pixels = None
    for index, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                if index == 0:
                    mode = "L" if image.mode in ("1", "L") else "RGB"
                array = torch.from_numpy(np.array(image.convert(mode)))
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is not a readable image ({error}); repair or remove it") from error
        array = array.unsqueeze(0) if mode == "L" else array.permute(2, 0, 1)
        if pixels is None:
            pixels = torch.empty((len(paths), *array.shape), dtype=torch.uint8)
        if array.shape != pixels.shape[1:]:
            raise UserError(
                f"{path} is {tuple(array.shape)} (channels, height, width), but {first} is {tuple(pixels.shape[1:])}; all images must be equally large"
            )
        pixels[index] = array
    assert pixels is not None
    return pixels
