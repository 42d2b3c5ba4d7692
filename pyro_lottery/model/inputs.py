"""The inputs of predictions: tensors, trees of tensors and splits, which are held in memory, or a loader, which is read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_lottery import trees
from pyro_lottery.errors import UserError, check_counts

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def is_loader(x: Any) -> bool:
    """Whether ``x`` is an iterable of batches.

    Tensors, arrays, sequences that can be sliced, and tuples, mappings and lists of tensors are not: they are the inputs
    themselves. Raises ``UserError`` if ``x`` is neither inputs nor a loader.
    """
    if isinstance(x, Dataset):
        raise UserError(f"a {type(x).__name__} yields single examples; pass DataLoader(dataset, batch_size=500)")
    if isinstance(x, list):
        return not all(isinstance(part, Tensor | np.ndarray) for part in x)
    if isinstance(x, Tensor | np.ndarray | tuple | Mapping) or (hasattr(x, "__getitem__") and isinstance(x, Sized)):
        return False
    if not isinstance(x, Iterable):
        raise UserError(f"inputs are a {type(x).__name__}; pass tensors, a split of a Data, or a loader of batches")
    return True


def slices(x: Any, batch_size: int, device: torch.device) -> Iterator[Any]:
    """Inputs held in memory in parts of ``batch_size`` examples, on ``device``; raises ``UserError`` if there are none."""
    check_counts(1, batch_size=batch_size)
    x = trees.as_tensors(x)
    split = not isinstance(x, Tensor | tuple | list | Mapping)
    count = len(x) if split else trees.count(x)
    if not count:
        raise UserError("there are no examples to predict; give at least one")
    for start in range(0, count, batch_size):
        index = slice(start, start + batch_size)
        part = x[index] if split else trees.map_tensors(lambda t: t[index], x)  # noqa: B023
        yield trees.map_tensors(lambda t: t.to(device), part)


def batches(loader: Any, device: torch.device) -> Iterator[Any]:
    """The inputs x of every batch, x or (x, y), on ``device``; raises ``UserError`` if the loader shuffles or drops examples."""
    _check_order(loader)
    empty = True
    for batch in loader:
        x, empty = trees.as_tensors(_inputs(batch)), False
        trees.count(x)
        yield trees.map_tensors(lambda t: t.to(device), x)
    if empty:
        raise UserError("the loader yields no batch to predict; give at least one")


def _inputs(batch: Any) -> Any:
    if not isinstance(batch, tuple | list):
        return batch
    if len(batch) not in (1, 2):
        raise UserError(
            f"a batch must be x or (x, y), got {len(batch)} parts; pass several inputs as one x, a tuple or a dict"
        )
    return batch[0]


def _check_order(loader: Any) -> None:
    loader = getattr(loader, "loader", loader)  # a Stream wraps its loader
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    for sampler in samplers:
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise UserError(
                f"the loader's DistributedSampler yields a part of the examples, for 1 of {sampler.num_replicas} processes; leave it out"
            )
    if any(isinstance(s, _SHUFFLING) or (isinstance(s, DistributedSampler) and s.shuffle) for s in samplers):
        raise UserError("the loader shuffles, so predictions could not be matched to examples; use shuffle=False")
    if isinstance(loader, DataLoader) and getattr(batch_sampler, "drop_last", False):
        size, count = batch_sampler.batch_size, len(samplers[1])  # type: ignore[union-attr, arg-type]
        if count % size:
            raise UserError(
                f"the loader drops the last {count % size} of {count} examples; use drop_last=False to predict all of them"
            )
