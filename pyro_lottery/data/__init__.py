"""Data sets: tensors on the device, normalised and augmented batch by batch, or streams of batches from loaders."""

from __future__ import annotations

from pyro_lottery.data.batches import AUGMENTATIONS, Epoch, Split, batch, crop_and_flip, shuffle
from pyro_lottery.data.by_name import DOWNLOADS, OWN, list_datasets, load, title
from pyro_lottery.data.images import PIXELS, SIDES
from pyro_lottery.data.loaders import from_loaders
from pyro_lottery.data.shifts import (
    CIFAR10,
    CORRUPTIONS,
    OOD,
    SEVERITIES,
    cifar10_c,
    corrupt,
    from_cifar10_c,
    out_of_distribution,
)
from pyro_lottery.data.splits import Data, in_memory, stratified_split
from pyro_lottery.data.streams import Stream, StreamEpoch, recorded, stream_of
from pyro_lottery.data.tensors import from_tensors

__all__ = [
    "AUGMENTATIONS", "CIFAR10", "CORRUPTIONS", "DOWNLOADS", "OOD", "OWN", "PIXELS", "SEVERITIES", "SIDES", "Data", "Epoch",
    "Split", "Stream", "StreamEpoch", "batch", "cifar10_c", "corrupt", "crop_and_flip", "from_cifar10_c", "from_loaders", "from_tensors", "in_memory",
    "list_datasets", "load", "out_of_distribution", "recorded", "shuffle", "stratified_split", "stream_of", "title",
]  # fmt: skip
