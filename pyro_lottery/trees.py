"""Functions on a network's inputs: one tensor, or a tuple, list or mapping of tensors, nested to any depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError


def map_tensors(f: Callable[[Tensor], Any], x: Any) -> Any:
    """Return ``x`` with every tensor ``t`` in it replaced by ``f(t)``; other values stay as they are.

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
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)  # a named tuple takes separate arguments
    return x


def tensors(x: Any) -> Iterator[Tensor]:
    """Yield every tensor in ``x``, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for part in x.values():
            yield from tensors(part)
    elif isinstance(x, tuple | list):
        for part in x:
            yield from tensors(part)


def shapes(x: Any) -> str:
    """Return the shape and dtype of every tensor in ``x`` as text for a message.

    >>> import torch
    >>> shapes((torch.zeros(3, 2), torch.zeros(3).long()))
    '[3, 2] float32, [3] int64'
    """
    return ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors(x))


def first_tensor(x: Any) -> Tensor:
    """Return the first tensor in ``x``, for example to find its device. Raises ``UserError`` if there is none."""
    found = next(tensors(x), None)
    if found is None:
        raise UserError(f"a batch must be a tensor, or a tuple, list or mapping of tensors; got a {type(x).__name__}")
    return found


def count(x: Any) -> int:
    """Return the number of examples in a batch, which is the first dimension of each of its tensors.

    Raises ``UserError`` if the tensors differ in it.
    """
    first_tensor(x)
    sizes = [value.shape[0] if value.ndim else None for value in tensors(x)]
    if sizes[0] is None or any(size != sizes[0] for size in sizes):
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors(x))
        raise UserError(
            f"the tensors of a batch must have the same first dimension, the examples; got tensors of {shapes}"
        )
    return sizes[0]


def as_real(value: Any) -> Tensor:
    """Return a tensor, a numpy array or a pandas object as a tensor. Raises ``UserError`` unless it holds real numbers."""
    if np.ma.is_masked(value):
        raise UserError("measures need every entry, but some are masked; leave these examples out")
    try:
        if not isinstance(value, Tensor) and hasattr(value, "__array__"):
            value = np.array(value, order="C")  # torch reads pandas by its index, and cannot read negative strides
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        raise UserError(f"measures take tensors or numpy arrays of real numbers, got a {type(value).__name__}")
    return found


def as_tensors(x: Any) -> Any:
    """Return ``x`` with every numpy array in it replaced by a tensor.

    Raises ``UserError`` for an array with masked entries, or of a type that torch does not have, and for sparse tensors.
    """
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise UserError(f"inputs must be dense, got a tensor of the layout {x.layout}; use x.to_dense()")
    if np.ma.is_masked(x):
        raise UserError("the inputs have masked entries; fill them, or leave these examples out")
    if isinstance(x, np.ndarray):
        try:
            return torch.as_tensor(np.ascontiguousarray(x))
        except (TypeError, ValueError) as error:
            raise UserError(f"inputs of the numpy type {x.dtype} cannot be read; use x.astype(np.float32)") from error
    if isinstance(x, Mapping):
        return {key: as_tensors(value) for key, value in x.items()}
    if isinstance(x, tuple | list) and not hasattr(x, "_fields"):
        return type(x)(as_tensors(part) for part in x)
    return x
