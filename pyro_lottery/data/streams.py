"""Splits that are read batch by batch, from whatever gives (x, y) pairs: data larger than memory, own augmentation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset

from pyro_lottery import seeds, trees
from pyro_lottery.data.batches import Split
from pyro_lottery.errors import UserError, one_line


@dataclass(frozen=True, eq=False)
class Stream:
    """(x, y) batches of a ``loader`` that can be read again and again: a DataLoader, a list, a class of one's own.

    x is what the network takes: a tensor, or a tuple, list or mapping of tensors; y holds the targets. Iterating checks
    every batch and brings it to ``device``; ``UserError`` in one line for one that is odd.
    """

    loader: Any
    num_data: int
    """Examples in one pass."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return self.num_data

    @property
    def steps(self) -> int:
        """Batches in one pass."""
        return len(self.loader)

    @property
    def last_batch(self) -> int | None:
        """Examples in the last batch of a pass; None where it cannot be told."""
        loader = self.loader
        if isinstance(loader, list | tuple):
            return trees.count(checked(loader[-1])[0])
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            return None
        return loader.batch_size if loader.drop_last else self.num_data % loader.batch_size or loader.batch_size

    @property
    def gives_all(self) -> bool:
        """Whether a pass is known to leave out no example, as one that drops a ragged last batch does."""
        loader = self.loader
        return isinstance(loader, list | tuple) or (
            isinstance(loader, DataLoader) and loader.batch_size is not None and not loader.drop_last
        )

    def to(self, device: torch.device) -> Stream:
        """The same, whose batches come to ``device``."""
        return replace(self, device=device)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """A pass whose random numbers are the same each time; ``UserError`` for one of more or fewer batches than ``steps``."""
        with Shuffled(self.loader, 0, "pass") as batches:
            for step in range(self.steps):
                yield checked(_there(batches.next(), step, self.steps), self.device)
            _check_end(batches, self.steps)

    def head(self) -> tuple[Any, Tensor]:
        """The first two examples of a first batch, which follow a stream of random numbers of their own."""
        with Shuffled(self.loader, 0, "head") as batches:
            x, y = checked(batches.next(), self.device)
        return trees.map_tensors(lambda t: t[:2], x), y[:2]


def stream_of(loader: Any, name: str, num_data: int | None = None, otherwise: int | None = None) -> Stream:
    """A :class:`Stream` of ``loader``; ``UserError`` for what has no length, is empty, or can be read once only.

    ``num_data`` is the number of its examples, whatever it says itself, and ``otherwise`` the number where it says none.
    """
    if isinstance(loader, Stream):
        return loader
    if not hasattr(loader, "__iter__") or isinstance(loader, str | bytes | dict | Tensor | np.ndarray):
        raise UserError(
            f"{name} is a {type(loader).__name__}; give a DataLoader, or another iterable of (x, y) batches"
        )
    if hasattr(loader, "__next__"):
        raise UserError(
            f"{name} is a {type(loader).__name__}, which can be read once only; give a list of batches, a DataLoader, or a class with "
            "__iter__ and __len__"
        )
    try:
        steps = len(loader)
    except TypeError as error:
        raise UserError(
            f"{name} has no length ({one_line(error)}); give its class a __len__ that says how many batches a pass has"
        ) from error
    if not steps:
        raise UserError(f"{name} has no batches")
    counted = num_data if num_data is not None else _count(loader)
    counted = otherwise if counted is None else counted
    if counted is None:
        raise UserError(f"how many examples {name} has cannot be told from a {type(loader).__name__}; give num_data")
    return Stream(loader, counted)


def measured_stream(loader: Any, name: str) -> Stream:
    """A :class:`Stream` to measure on, which must give every example; where a loader does not tell how many, a pass does."""
    stream = stream_of(loader, name, otherwise=0)
    size = getattr(loader, "batch_size", None)
    if isinstance(loader, DataLoader) and loader.drop_last and size and (left := len(stream) % size):
        raise UserError(f"{name} leaves out {left} of its {len(stream)} examples; give its DataLoader drop_last=False")
    return stream if len(stream) else replace(stream, num_data=sum(len(y) for _, y in stream))


def _count(loader: Any) -> int | None:
    if isinstance(loader, list | tuple):
        return sum(trees.count(checked(batch)[0]) for batch in loader)
    if not isinstance(loader, DataLoader):
        return len(loader.dataset) if isinstance(getattr(loader, "dataset", None), Sized) else None
    if isinstance(loader.batch_sampler, BatchSampler) and isinstance(loader.batch_sampler.sampler, Sized):
        return len(loader.batch_sampler.sampler)  # which may take a part of the data set
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else None


def known(split: Split | Stream | None) -> list[Tensor]:
    """What can be told of a split's examples without reading all of them: every tensor that is held in memory, or else the
    targets of the first two. Not the inputs, which may be augmented by random numbers that nobody here can seed.
    """
    if not isinstance(split, Stream):
        return [] if split is None else [split.inputs, split.targets]
    if isinstance(split.loader, list | tuple):
        return [t for batch in split.loader for t in trees.tensors(checked(batch))]
    dataset = getattr(split.loader, "dataset", None)
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, TensorDataset):
        return [t[torch.as_tensor(dataset.indices)] for t in dataset.dataset.tensors]
    return list(dataset.tensors) if isinstance(dataset, TensorDataset) else [split.head()[1]]


def classes_of(loader: Any, y: Tensor, name: str) -> tuple[int | None, tuple[str, ...] | None]:
    """How many classes the targets of ``loader`` have, None for real ones, and their names where they are known."""
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
        raise UserError(f"the targets of {name} are classes, and how many there are cannot be told; give num_classes")
    return 1 + max(int(labels.max()) for labels in labelled), None


def checked(batch: Any, device: torch.device | None = None) -> tuple[Any, Tensor]:
    """``batch`` as (x, y) on ``device``, floats in single precision; ``UserError`` for one that is odd."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"a {type(batch).__name__}"
        what += f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
        raise UserError(
            f"a batch must be a pair (x, y), got {what}; several inputs belong into x, as a tuple or a dict of tensors"
        )
    x, y = (trees.map_tensors(lambda t: _moved(t, device), trees.as_tensors(part)) for part in batch)
    if not isinstance(y, Tensor):
        raise UserError(f"the targets of a batch must be a tensor, got a {type(batch[1]).__name__}")
    if trees.count(x) != len(y if y.ndim else y[None]):
        raise UserError(f"a batch has {trees.count(x)} inputs and {len(y) if y.ndim else 'no'} targets")
    if not len(y):
        raise UserError("a batch has no examples")
    for what, part in (("inputs", x), ("targets", y)):
        for value in trees.tensors(part):
            if what == "inputs" and value.dtype == torch.uint8:
                raise UserError(
                    "the inputs of a batch are uint8; a loader gives what the network gets: floats, by ToDtype(torch.float32, "
                    "scale=True) and Normalize say"
                )
            if value.is_floating_point() and value.device.type == "cpu" and not bool(value.isfinite().all()):
                raise UserError(f"the {what} of a batch hold values that are not finite; fill or drop these examples")
    return x, y


def _moved(value: Tensor, device: torch.device | None) -> Tensor:
    value = value.float() if value.is_floating_point() else value
    return value if device is None else value.to(device, non_blocking=True)


class Shuffled:
    """One pass over a loader whose random numbers follow a seed: torch's, numpy's and Python's global generators while a
    batch is made, and the generators that the loader and its sampler own. All are as before afterwards.

    Workers of a DataLoader are seeded from these. A sampler's ``set_epoch`` is called with ``epoch``. What else draws random
    numbers, a generator of the user's own say, is his to seed.
    """

    def __init__(self, loader: Any, seed: int, *path: str | int, epoch: int = 0):
        self._loader, self._epoch = loader, epoch
        self._torch = seeds.Stream("cpu", seed, "loader", *path)
        number = seeds.derive(seed, "loader", *path)
        self._python: Any = random.Random(number).getstate()
        self._numpy: Any = np.random.RandomState(number % 2**32).get_state()
        places = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        places.append(getattr(places[-1], "sampler", None))
        self._samplers = list({id(place): place for place in places if place is not None}.values())
        owned = {id(g): g for p in places if isinstance(g := getattr(p, "generator", None), torch.Generator)}
        self._own = [(g, g.get_state(), seeds.derive(seed, "loader", *path)) for g in owned.values()]
        self._iterator: Any = None

    def __enter__(self) -> Shuffled:
        if getattr(self._loader, "persistent_workers", False):
            self._loader._iterator = None  # workers that stay would go on with the random numbers of the pass before
        for generator, _, number in self._own:
            generator.manual_seed(number)
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._epoch)
        self._drawing(lambda: setattr(self, "_iterator", iter(self._loader)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._iterator = None  # which ends a DataLoader's workers
        for generator, state, _ in self._own:
            generator.set_state(state)

    def next(self) -> Any:
        """The next batch as the loader gives it; ``UserError`` where there is none."""
        return self._drawing(lambda: next(self._iterator, _END))

    def _drawing(self, work: Any) -> Any:
        with self._torch:
            self._swap()
            try:
                return work()
            finally:
                self._swap()

    def _swap(self) -> None:
        python, numbers = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        self._python, self._numpy = python, numbers


_END = object()


def _there(batch: Any, step: int, steps: int) -> Any:
    if batch is _END:
        raise UserError(
            f"the loader gave {step} batches of {steps} in this pass; it must give as many as its length says, in every pass"
        )
    return batch


def _check_end(batches: Shuffled, steps: int) -> None:
    if batches.next() is not _END:
        raise UserError(f"the loader gave more than the {steps} batches that its length says")


class StreamEpoch:
    """One pass over a :class:`Stream` for training: its batches in order, counted, each checked."""

    whole_only = True
    """A training can stop and go on at the ends of passes alone."""

    def __init__(self, stream: Stream, seed: int, level: int, epoch: int):
        self._stream, self._seen, self._largest = stream, 0, 0
        self._batches = Shuffled(stream.loader, seed, level, epoch, epoch=epoch)

    def __len__(self) -> int:
        return self._stream.steps

    def batch(self, step: int) -> tuple[Any, Tensor]:
        """Batch ``step``, which must follow the one before."""
        x, y = checked(_there(self._batches.next(), step, len(self)), self._stream.device)
        self._seen, self._largest = self._seen + len(y), max(self._largest, len(y))
        return x, y

    def __enter__(self) -> StreamEpoch:
        self._batches.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._batches.__exit__(*exception)

    def end(self) -> None:
        """Raise ``UserError`` unless the pass had the examples and batches that it was said to have."""
        _check_end(self._batches, len(self))
        least = self._stream.num_data - (
            0 if self._stream.gives_all else self._largest - 1
        )  # of a batch that was dropped
        if not least <= self._seen <= self._stream.num_data:
            raise UserError(
                f"the loader gave {self._seen} examples in a pass, but num_data is {self._stream.num_data}; give their number"
            )


class Recorded:
    """A stream, batch by batch; after one pass ``targets`` are those that came with the inputs, in their order."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._targets: list[Tensor] = []

    def __len__(self) -> int:
        return self._stream.steps

    def __iter__(self) -> Iterator[Any]:
        self._targets = []
        for x, y in self._stream:
            self._targets.append(y)
            yield x, y

    @property
    def targets(self) -> Tensor:
        """Those of the last pass."""
        return torch.cat(self._targets)


def recorded(split: Split | Stream) -> Any:
    """What :func:`pyro_lottery.predict` takes, whose ``targets`` are in the order of what it returns."""
    return Recorded(split) if isinstance(split, Stream) else split
