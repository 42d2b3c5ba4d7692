"""Where images come from: torchvision's downloads, scikit-learn's digits; trees of image files are in folders.py."""

from __future__ import annotations

import http.client
import urllib.error
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor

from pyro_lottery.data.images import Arrays, Images
from pyro_lottery.errors import UserError

_NO_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def digits(_: Path, write: bool = True, image_size: int | None = None) -> Images:
    """The 1,797 8×8 digits that scikit-learn ships; every fifth of a fixed shuffle is the test set (360)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[::5], order[torch.arange(len(order)) % 5 != 0]
    found = Images((pixels[train], labels[train]), (pixels[test], labels[test]), tuple(map(str, bunch.target_names)))
    return found.resized(image_size)


def torchvision_source(name: str, archive: str) -> Callable[[Path, bool, int | None], Images]:
    """A loader for one of torchvision's data sets; ``archive`` is the file that a user without network must bring."""

    def load(root: Path, write: bool = True, image_size: int | None = None) -> Images:
        try:
            try:  # without the lock, so that a read-only copy will do
                found = _both(name, root)
            except RuntimeError:
                if not write:
                    raise
                root.mkdir(parents=True, exist_ok=True)
                # Jobs started together wait here: the first downloads, torchvision checks the hash, the others read.
                with filelock.FileLock(root / f".{name}.lock"):
                    found = _both(name, root, download=True)
        except (*_NO_NETWORK, RuntimeError) as error:
            raise UserError(
                f"--dataset {name.lower()}: {root} holds no complete copy and the download failed ({error}); "
                f"put {archive} there, or try --dataset digits, which needs no download"
            ) from error
        return found.resized(image_size)

    return load


def _both(name: str, root: Path, download: bool = False) -> Images:
    train, classes = _split(name, root, True, download)
    return Images(train, _split(name, root, False, download)[0], classes)


def _split(name: str, root: Path, train: bool, download: bool = False) -> tuple[Arrays, tuple[str, ...]]:
    import torchvision

    # A copy that is there is checked by its hash; even with download=True it never touches the network.
    which = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    dataset = getattr(torchvision.datasets, name)(root, download=download, **which)
    pixels = torch.from_numpy(np.asarray(dataset.data))
    labels = dataset.labels if name == "SVHN" else dataset.targets
    if name != "SVHN":  # SVHN is stored with channels first
        pixels = pixels.permute(0, 3, 1, 2)
    arrays = pixels.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return arrays, tuple(getattr(dataset, "classes", map(str, range(10))))  # SVHN's are digits


def present(name: str, root: Path) -> Tensor:
    """The test images of one of torchvision's data sets where a copy is in ``root``; ``UserError`` where none is."""
    try:
        return _split(name, root, False)[0][0]
    except RuntimeError as error:
        raise UserError(f"{root} holds no complete copy of {name} ({error}); put one there, or leave it out") from error
