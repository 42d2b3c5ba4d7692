"""Sources of images: torchvision's downloads and scikit-learn's digits. Folders of image files are read in folders.py."""

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
    """Return scikit-learn's 1,797 digits of 8×8 pixels; after a fixed shuffle, every fifth (360) is in the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[::5], order[torch.arange(len(order)) % 5 != 0]
    found = Images((pixels[train], labels[train]), (pixels[test], labels[test]), tuple(map(str, bunch.target_names)))
    return found.resized(image_size)


def torchvision_source(name: str, archive: str) -> Callable[[Path, bool, int | None], Images]:
    """Return a function that loads a data set of torchvision; ``archive`` is the file that a user without network needs."""

    def load(root: Path, write: bool = True, image_size: int | None = None) -> Images:
        try:
            try:  # without the lock, so that a read-only copy is sufficient
                found = _both(name, root)
            except RuntimeError:
                if not write:
                    raise
                root.mkdir(parents=True, exist_ok=True)
                # Processes that start together wait here: the first one downloads, and then the others read its copy.
                with filelock.FileLock(root / f".{name}.lock"):
                    found = _both(name, root, download=True)
        except (*_NO_NETWORK, RuntimeError) as error:
            raise UserError(
                f"--dataset {name.lower()}: {root} has no complete copy and the download failed ({error}); "
                f"put {archive} there, or use --dataset digits, which needs no download"
            ) from error
        return found.resized(image_size)

    return load


def _both(name: str, root: Path, download: bool = False) -> Images:
    train, classes = _split(name, root, True, download)
    return Images(train, _split(name, root, False, download)[0], classes)


def _split(name: str, root: Path, train: bool, download: bool = False) -> tuple[Arrays, tuple[str, ...]]:
    import torchvision

    # torchvision verifies an existing copy by its hash, and does not use the network then, even with download=True.
    which = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    dataset = getattr(torchvision.datasets, name)(root, download=download, **which)
    pixels = torch.from_numpy(np.asarray(dataset.data))
    labels = dataset.labels if name == "SVHN" else dataset.targets
    if name != "SVHN":  # SVHN alone is stored with channels first
        pixels = pixels.permute(0, 3, 1, 2)
    arrays = pixels.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return arrays, tuple(getattr(dataset, "classes", map(str, range(10))))  # SVHN's are digits


def present(name: str, root: Path) -> Tensor:
    """Return the test images of a data set of torchvision. Raises ``UserError`` if ``root`` has no complete copy of it."""
    try:
        return _split(name, root, False)[0][0]
    except RuntimeError as error:
        raise UserError(f"{root} has no complete copy of {name} ({error}); put one there or leave it out") from error
