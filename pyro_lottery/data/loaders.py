"""Data sets from the user's own loaders."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_lottery import files, trees
from pyro_lottery.data.batches import Split
from pyro_lottery.data.splits import Data
from pyro_lottery.data.streams import Stream, checked, measured_stream, stream_of
from pyro_lottery.errors import UserError, check_counts


def from_loaders(
    train: Any, test: Any = None, val: Any = None, *, num_data: int | None = None, num_classes: int | None = None
) -> Data:
    """Make a :class:`Data` whose splits are read batch by batch from DataLoaders or other iterables with a length.

    A batch is a pair (x, y) of the network's input and the targets (floats or integers); x may be a tuple, list or mapping of
    tensors for a ``forward`` with several inputs. ``test`` and ``val`` may also be a :class:`Split`. ``num_data`` is the
    number of training examples in a pass and ``num_classes`` the number of classes; each is needed if it cannot be found
    from the loader. An epoch is one pass over ``train``. The random numbers of a pass, including those of numpy, Python and
    workers, follow the seed of the training. A run recognises its data by what is in memory (tensors, ``targets`` of a data set, indices of
    subsets and samplers), by the targets of a pass over ``test`` and ``val``, and of other training sets by two targets. Raises ``UserError`` if the loaders or their first batches are not usable.
    """
    given = {"num_data": num_data, "num_classes": num_classes}
    check_counts(1, **{name: number for name, number in given.items() if number is not None})
    stream = stream_of(train, "train", num_data)
    x, y = stream.head()
    if num_classes and y.is_floating_point():
        raise UserError(f"num_classes is {num_classes}, but the targets are real ({y.dtype}); give labels as y.long()")
    found, names = (num_classes, None) if num_classes else _classes_of(train, y, "train")
    others = [
        each if each is None or isinstance(each, Split) else measured_stream(each, name)
        for name, each in (("test", test), ("val", val))
    ]
    splits = (stream, *others)
    facts = [[(tuple(t.shape[1:]), str(t.dtype)) for t in trees.tensors((x, y))], *map(_how, splits)]
    told = {f"{part}/{i}": t.cpu() for part, each in enumerate(splits) for i, t in enumerate(_known(each, part == 0))}
    return Data(stream, others[0], others[1], found, "none", files.checksum(told, str(facts)), names)


def _how(split: Split | Stream | None) -> list[Any]:
    """How a split is read: its numbers of examples and batches, and what its loader and samplers are told in plain numbers."""
    if not isinstance(split, Stream):
        return []
    told = ("batch_size", "drop_last", "num_samples", "replacement", "shuffle")
    return [len(split), split.steps] + [
        (type(each).__name__, [(name, value) for name in told if isinstance(value := getattr(each, name, None), int)])
        for each in _samplers(split.loader)
    ]


def _samplers(loader: Any) -> list[Any]:
    """A DataLoader's samplers, of batches and of examples."""
    if not isinstance(loader, DataLoader):
        return []
    batches = loader.batch_sampler
    inner = getattr(batches, "sampler", loader.sampler)
    return [batches, inner]


def _known(split: Split | Stream | None, is_training: bool) -> list[Tensor]:
    """Return the tensors that identify a split's data without reading all of a training set.

    These are all tensors that are held in memory, or else the targets: of the data set, of a pass over a test set, or of the first two
    training examples. Inputs from a loader are not used, since they may be augmented with random numbers that this library cannot seed.
    """
    if not isinstance(split, Stream):
        return [] if split is None else [split.inputs, split.targets]
    if isinstance(split.loader, list | tuple):
        return [t for batch in split.loader for t in trees.tensors(checked(batch))]
    chosen = (
        _numbers(getattr(each, name, None)) for each in _samplers(split.loader) for name in ("indices", "weights")
    )
    dataset, index = _within(getattr(split.loader, "dataset", None))
    held = _held(dataset)
    rows = [t if index is None else t[index] for t in held]
    if isinstance(dataset, TensorDataset):
        index = None  # another order in a larger data set may give the same rows
    elif not rows:
        rows = [split.head()[1]] if is_training else [y.clone() for _, y in split]
    return [*rows, *(t for t in (index, *chosen) if t is not None)]


def _within(dataset: Any) -> tuple[Any, Tensor | None]:
    """The data set of which ``dataset`` is a ``Subset``, and the indices of its examples there; None for all."""
    index = None
    while isinstance(dataset, Subset):
        part = torch.as_tensor(dataset.indices)
        dataset, index = dataset.dataset, part if index is None else part[index]
    return dataset, index


def _held(dataset: Any) -> list[Tensor]:
    """The tensors that a data set holds, or else its targets, each with all examples; none if it tells of none."""
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors)
    named = (_numbers(getattr(dataset, name, None)) for name in ("targets", "labels"))
    return [t for t in named if t is not None and t.ndim and isinstance(dataset, Sized) and len(t) == len(dataset)][:1]


def _numbers(values: Any) -> Tensor | None:
    """``values`` as a tensor, or None if they are no numbers."""
    try:
        return None if values is None else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None


def _classes_of(loader: Any, y: Tensor, name: str) -> tuple[int | None, tuple[str, ...] | None]:
    """Return the number of classes (None for real targets) and their names (None if they are unknown).

    Raises ``UserError`` if the loader does not tell the number of classes.
    """
    if y.is_floating_point():
        return None, None
    dataset = getattr(loader, "dataset", None)
    named = getattr(dataset, "classes", None)
    if named is not None and all(isinstance(each, str) for each in named):
        return len(named), tuple(named)
    labelled = [dataset.tensors[-1]] if isinstance(dataset, TensorDataset) else []
    if isinstance(loader, list | tuple):
        labelled = [torch.as_tensor(batch[1]) for batch in loader]
    if not labelled:
        raise UserError(f"the targets of {name} are classes, but their number is not known; give num_classes")
    return 1 + max(int(labels.max()) for labels in labelled), None
