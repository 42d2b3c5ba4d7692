"""Batches as networks take them: one tensor, or a tuple, a list or a mapping of tensors, nested at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError


def map_tensors(f: Callable[[Tensor], Any], x: Any) -> Any:
    """``x`` with ``f`` of every tensor in it; what is neither a tensor nor holds some stays.

    >>> import torch
    >>> map_tensors(len, (torch.zeros(3, 2), {"mask": torch.zeros(3), "name": "a"}))
    (3, {'mask': 3, 'name': 'a'})
    """
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, Mapping):
        return {key: map_tensors(f, value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        parts = [map_tensors(f, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)  # a named tuple takes them one by one
    return x


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in ``x``, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for part in x.values():
            yield from tensors(part)
    elif isinstance(x, tuple | list):
        for part in x:
            yield from tensors(part)


def shapes(x: Any) -> str:
    """The shape and dtype of every tensor in ``x``, for a message.

    >>> import torch
    >>> shapes((torch.zeros(3, 2), torch.zeros(3).long()))
    '[3, 2] float32, [3] int64'
    """
    return ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors(x))


def first_tensor(x: Any) -> Tensor:
    """The first tensor in ``x``, which tells its device; ``UserError`` if there is none."""
    found = next(tensors(x), None)
    if found is None:
        raise UserError(f"a batch must be a tensor, or a tuple, list or mapping of tensors; got a {type(x).__name__}")
    return found


def count(x: Any) -> int:
    """The number of examples in a batch: the first dimension of each of its tensors; ``UserError`` where they differ."""
    first_tensor(x)
    sizes = [value.shape[0] if value.ndim else None for value in tensors(x)]
    if sizes[0] is None or any(size != sizes[0] for size in sizes):
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors(x))
        raise UserError(f"the first dimension of a batch's tensors must be the examples, got tensors of {shapes}")
    return sizes[0]


def as_real(value: Any) -> Tensor:
    """``value``, a tensor, an array, a column or a table, as a tensor; ``UserError`` for what holds no real numbers."""
    if np.ma.is_masked(value):
        raise UserError("measures are of every entry, and some are masked; leave these examples out")
    try:
        if not isinstance(value, Tensor) and hasattr(value, "__array__"):
            value = np.array(value, order="C")  # torch reads pandas by its index, and no array backwards
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        raise UserError(f"measures are of tensors or numpy arrays of real numbers, got a {type(value).__name__}")
    return found


def as_tensors(x: Any) -> Any:
    """``x`` with tensors for the numpy arrays in it."""
    if isinstance(x, np.ndarray):
        return torch.as_tensor(np.ascontiguousarray(x))
    if isinstance(x, Mapping):
        return {key: as_tensors(value) for key, value in x.items()}
    if isinstance(x, tuple | list) and not hasattr(x, "_fields"):
        return type(x)(as_tensors(part) for part in x)
    return x
