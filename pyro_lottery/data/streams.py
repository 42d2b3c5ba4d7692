"""Splits that are read batch by batch from a loader, for data larger than memory and for the user's own augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from pyro_lottery import trees
from pyro_lottery.data.batches import Split
from pyro_lottery.data.passes import Shuffled, check_end, present
from pyro_lottery.errors import UserError, one_line


@dataclass(frozen=True, eq=False)
class Stream:
    """A split of (x, y) batches from ``loader``: a DataLoader, a list or another iterable that can be read repeatedly.

    x is the network's input (a tensor, or a tuple, list or mapping of tensors) and y holds the targets. Iterating checks every
    batch and moves it to ``device``. Raises ``UserError`` for a batch that is not usable.
    """

    loader: Any
    num_data: int
    """Number of examples in a pass."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return self.num_data

    @property
    def steps(self) -> int:
        """Number of batches in a pass."""
        return len(self.loader)

    @property
    def last_batch(self) -> int | None:
        """Number of examples in the last batch of a pass, or None if it is not known."""
        loader = self.loader
        if isinstance(loader, list | tuple):
            return trees.count(checked(loader[-1])[0])
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            return None
        return loader.batch_size if loader.drop_last else self.num_data % loader.batch_size or loader.batch_size

    @property
    def gives_all(self) -> bool:
        """Whether a pass is known to give every example; one that drops an incomplete last batch does not."""
        loader = self.loader
        return isinstance(loader, list | tuple) or (
            isinstance(loader, DataLoader) and loader.batch_size is not None and not loader.drop_last
        )

    def to(self, device: torch.device) -> Stream:
        """Return a stream whose batches are moved to ``device``."""
        return replace(self, device=device)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Make a pass with the same random numbers each time. Raises ``UserError`` unless it has ``steps`` batches."""
        with Shuffled(self.loader, 0, "pass") as batches:
            for step in range(self.steps):
                yield checked(present(batches.next(), step, self.steps), self.device)
            check_end(batches, self.steps)

    def some(self, count: int, seed: int, *path: str | int) -> Iterator[tuple[Any, Tensor]]:
        """Yield inputs and targets [b, ...] of the first ``count`` batches of a pass, or all, with random numbers that follow ``seed`` and ``path``."""
        with Shuffled(self.loader, seed, *path) as batches:
            for step in range(min(count, self.steps)):
                yield checked(present(batches.next(), step, self.steps), self.device)

    def head(self) -> tuple[Any, Tensor]:
        """Return inputs and targets [2, ...] of the first two examples of a pass, which has random numbers of its own."""
        with Shuffled(self.loader, 0, "head") as batches:
            x, y = checked(batches.next(), self.device)
        return trees.map_tensors(lambda t: t[:2], x), y[:2]


def stream_of(loader: Any, name: str, num_data: int | None = None, otherwise: int | None = None) -> Stream:
    """Make a :class:`Stream` of ``loader``, which messages call ``name``.

    ``num_data``, if given, is its number of examples; ``otherwise`` is used if the loader does not report one. Raises
    ``UserError`` for a loader without a length, without batches, or that can be read only once.
    """
    if isinstance(loader, Stream):
        return loader
    if not hasattr(loader, "__iter__") or isinstance(loader, str | bytes | dict | Tensor | np.ndarray):
        raise UserError(
            f"{name} is a {type(loader).__name__}; give a DataLoader, or another iterable of (x, y) batches"
        )
    if hasattr(loader, "__next__"):
        raise UserError(
            f"{name} is a {type(loader).__name__}, which can be read only once; give a list of batches, a DataLoader, or a "
            "class with __iter__ and __len__"
        )
    try:
        steps = len(loader)
    except TypeError as error:
        raise UserError(
            f"{name} has no length ({one_line(error)}); give its class a __len__ that returns the number of batches"
        ) from error
    if not steps:
        raise UserError(f"{name} has no batches; give at least one")
    counted = num_data if num_data is not None else _count(loader)
    counted = otherwise if counted is None else counted
    if counted is None:
        raise UserError(f"a {type(loader).__name__} does not tell how many examples {name} has; give num_data")
    return Stream(loader, counted)


def measured_stream(loader: Any, name: str) -> Stream:
    """Make a :class:`Stream` for measurements, which must give every example.

    If the loader does not report its number of examples, they are counted in a pass. Raises ``UserError`` for a DataLoader
    that drops its last batch.
    """
    stream = stream_of(loader, name, otherwise=0)
    sampler = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if isinstance(sampler, BatchSampler) and sampler.drop_last and (left := len(stream) % sampler.batch_size):
        raise UserError(
            f"{name} leaves out {left} of its {len(stream)} examples; set drop_last=False in its DataLoader or batch sampler"
        )
    return stream if len(stream) else replace(stream, num_data=sum(len(y) for _, y in stream))


def _count(loader: Any) -> int | None:
    if isinstance(loader, list | tuple):
        return sum(trees.count(checked(batch)[0]) for batch in loader)
    if not isinstance(loader, DataLoader):
        return len(loader.dataset) if isinstance(getattr(loader, "dataset", None), Sized) else None
    if isinstance(loader.batch_sampler, BatchSampler) and isinstance(loader.batch_sampler.sampler, Sized):
        return len(loader.batch_sampler.sampler)  # the sampler may take only a part of the data set
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else None


def checked(batch: Any, device: torch.device | None = None) -> tuple[Any, Tensor]:
    """Return ``batch`` as (x, y) on ``device``, with floats in single precision, or in double as they come.

    Raises ``UserError`` unless it is a pair of inputs and targets with the same number of examples and finite values.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"a {type(batch).__name__}"
        what += f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
        raise UserError(
            f"a batch must be a pair (x, y), got {what}; give several inputs as one x, a tuple or a dict of tensors"
        )
    x, y = (trees.map_tensors(lambda t: _moved(t, device), trees.as_tensors(part)) for part in batch)
    if not isinstance(y, Tensor):
        raise UserError(f"the targets of a batch must be a tensor, got a {type(batch[1]).__name__}")
    if not y.ndim:
        raise UserError(
            "the targets of a batch are a single number; give a tensor whose first dimension is the examples"
        )
    if trees.count(x) != len(y):
        raise UserError(f"a batch has {trees.count(x)} inputs and {len(y)} targets; each input needs one target")
    if not len(y):
        raise UserError("a batch has no examples; give at least one")
    for what, part in (("inputs", x), ("targets", y)):
        for value in trees.tensors(part):
            if what == "inputs" and value.dtype == torch.uint8:
                raise UserError(
                    "the inputs of a batch are uint8; give floats as the network takes them, for example with "
                    "ToDtype(torch.float32, scale=True) and Normalize"
                )
            if value.is_floating_point() and value.device.type == "cpu" and not bool(value.isfinite().all()):
                raise UserError(f"the {what} of a batch hold values that are not finite; fill or drop these examples")
    return x, y


def _moved(value: Tensor, device: torch.device | None) -> Tensor:
    value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return value if device is None else value.to(device, non_blocking=True)


class StreamEpoch:
    """One training pass over a :class:`Stream`, which checks each batch and counts the examples."""

    whole_only = True
    """Training may stop and resume only between passes."""

    def __init__(self, stream: Stream, seed: int, level: int, epoch: int):
        self._stream, self._seen, self._largest = stream, 0, 0
        self._batches = Shuffled(stream.loader, seed, level, epoch, epoch=epoch)

    def __len__(self) -> int:
        return self._stream.steps

    def batch(self, step: int) -> tuple[Any, Tensor]:
        """Return inputs and targets [b, ...] of batch ``step``. Batches must be read in order."""
        x, y = checked(present(self._batches.next(), step, len(self)), self._stream.device)
        self._seen, self._largest = self._seen + len(y), max(self._largest, len(y))
        return x, y

    def __enter__(self) -> StreamEpoch:
        self._batches.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._batches.__exit__(*exception)

    def end(self) -> None:
        """Raise ``UserError`` unless the pass had the expected numbers of batches and examples."""
        check_end(self._batches, len(self))
        dropped = 0 if self._stream.gives_all else self._largest - 1  # largest possible size of a dropped last batch
        least = self._stream.num_data - dropped
        if not least <= self._seen <= self._stream.num_data:
            raise UserError(
                f"the loader gave {self._seen} examples in a pass, but num_data is {self._stream.num_data}; correct num_data"
            )


class Recorded:
    """A stream that records the targets of a pass, in the order of the inputs."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._targets: list[Tensor] = []

    def __len__(self) -> int:
        return self._stream.steps

    def __iter__(self) -> Iterator[Any]:
        self._targets = []
        for x, y in self._stream:
            self._targets.append(y.clone())  # the loader may fill the same tensors again
            yield x, y

    @property
    def targets(self) -> Tensor:
        """Targets of the last pass."""
        return torch.cat(self._targets)


def recorded(split: Split | Stream) -> Any:
    """Return an input for :func:`pyro_lottery.predict` whose ``targets`` are in the order of the predictions."""
    return Recorded(split) if isinstance(split, Stream) else split
