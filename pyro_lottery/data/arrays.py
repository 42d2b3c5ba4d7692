"""Conversion of the user's arrays to tensors, and checks of the inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.machine import memory

Parts = Mapping[str, Tensor]
"""Tensors by the argument names of ``from_tensors``: train_x, test_x and possibly val_x, or the same with y."""


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if arguments, or columns or rows of DataFrames, are in the wrong order."""
    nested = {name for name, value in given.items() if isinstance(value, Tensor) and value.is_nested}  # without a shape
    shapes = {name: () if name in nested else getattr(value, "shape", ()) for name, value in given.items()}
    if len(shapes["test_x"]) == 1 < len(shapes["train_y"]) and shapes["train_y"][1:] == shapes["train_x"][1:]:
        raise UserError(
            "train_y looks like inputs and test_x like targets; the order is train_x, train_y, test_x, test_y, while "
            "scikit-learn's train_test_split returns train_x, test_x, train_y, test_y"
        )
    for part, which in ((part, which) for part in ("test", "val") for which in "xy"):
        columns, others = (getattr(given.get(f"{p}_{which}"), "columns", None) for p in ("train", part))
        if columns is not None and others is not None and list(columns) != list(others):
            name, train = f"{part}_{which}", f"train_{which}"
            raise UserError(
                f"the columns of {name} differ from those of {train} in name or order; give {name}[{train}.columns]"
            )
    for part in ("train", "test", "val"):
        x, y = (cast(Any, getattr(given.get(f"{part}_{which}"), "index", None)) for which in "xy")
        if hasattr(x, "equals") and hasattr(y, "equals") and not x.equals(y) and x.symmetric_difference(y).empty:
            raise UserError(
                f"{part}_x and {part}_y have the same index in different orders; give {part}_y.loc[{part}_x.index], or "
                f"{part}_y.to_numpy() if row i of one belongs to row i of the other"
            )


def as_tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` as a tensor of real numbers, which may share its memory.

    Raises ``UserError``, which calls the value ``name``, if it cannot be converted.
    """
    if isinstance(value, Tensor) and (
        value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta
    ):
        raise UserError(
            f"{name} is a tensor of {value.layout}, {value.dtype} on {value.device}; give a dense tensor of plain numbers"
        )
    tensor = value.detach().as_subclass(Tensor) if isinstance(value, Tensor) else _from_array(name, value)
    if tensor.is_complex():
        raise UserError(f"{name} holds complex numbers; give real ones, for example .real and .imag as two channels")
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has few functions for these
        tensor = tensor.to(torch.int64)
        if tensor.numel() and int(tensor.min()) < 0:
            raise UserError(f"{name} holds whole numbers beyond 2^63; give floats")
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.float()
    return tensor


def _from_array(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise UserError(f"{name} has masked entries; fill them, or drop these examples")
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value[:1]):
        raise UserError(
            f"{name} is a {type(value).__name__} of tensors; give one tensor, torch.stack({name}), or use "
            "pl.data.from_loaders for a network with several inputs"
        )
    if not hasattr(value, "__array__") and not isinstance(value, list | tuple):
        hint = f": {name}.toarray()" if hasattr(value, "toarray") else ", or batches to pl.data.from_loaders"
        raise UserError(f"{name} is a {type(value).__name__}; give a torch tensor or a numpy array{hint}")
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O":  # for example a DataFrame with a column of bools, or an array of arrays
            array = np.asarray(array.tolist())
    except ValueError as error:
        raise UserError(f"{name} is not an array ({one_line(error)}); give all examples the same shape") from error
    kind = array.dtype.kind
    if kind in "US":
        example = array.reshape(-1)[0].item() if array.size else ""
        raise UserError(
            f"{name} holds strings ({example!r}); give numbers. For class names, take classes = np.unique(train_y) and give "
            "np.searchsorted(classes, train_y), the same of test_y, and classes=classes"
        )
    if kind in "mM":
        seconds = "datetime64[s]" if kind == "M" else "timedelta64[s]"
        raise UserError(
            f"{name} holds dates or times ({array.dtype}); give numbers, such as seconds: .astype('{seconds}').astype('int64')"
        )
    if kind not in "biufc":
        odd = next((v for v in array.reshape(-1).tolist() if not isinstance(v, int | float)), None)
        raise UserError(
            f"{name} holds a value that is not a number ({type(odd).__name__}: {odd}); fill or drop such values and give floats"
        )
    if kind == "f" and array.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of read-only arrays, but nothing is written here
        return torch.from_numpy(array)


def check_inputs(given: Mapping[str, Any], channels_last: bool | None) -> dict[str, Tensor]:
    """Return the inputs as tensors [n, channels or features, ...], which may share the user's memory.

    Raises ``UserError`` if they have the wrong type, shape or size.
    """
    found = {name: as_tensor(name, value) for name, value in given.items()}
    for name, x in found.items():
        _check_shape(name, x, channels_last)
    if channels_last:
        found = {name: x.movedim(-1, 1) for name, x in found.items()}
    train = found["train_x"]
    for name, x in found.items():
        if x.shape[1:] != train.shape[1:]:
            raise UserError(
                f"examples of {name} have the shape {shape_of(x)}, but those of train_x {shape_of(train)}; give the same shape"
            )
        if (x.dtype == torch.uint8) != (train.dtype == torch.uint8):
            raise UserError(
                f"{name} is {kind_of(x)}, but train_x is {kind_of(train)}; give both as uint8, which is divided by 255, or neither"
            )
    size = 1 if train.dtype == torch.uint8 else 4
    if (needed := size * sum(x.numel() for x in found.values())) > (here := memory()):
        raise UserError(
            f"the data need {needed / 2**30:,.1f} GiB of memory, but there are {here / 2**30:,.1f} GiB; give batches to "
            "pl.data.from_loaders"
        )
    return found


def _check_shape(name: str, x: Tensor, channels_last: bool | None) -> None:
    shape = list(x.shape)
    if x.ndim < 2:
        right = f"give [n, features]: {name}[:, None]" if x.ndim else "give [n, features]"
        raise UserError(f"{name} has the shape {shape}, without a dimension of features or channels; {right}")
    if not len(x):
        raise UserError(f"{name} has no examples; give at least one")
    if not x.numel():
        raise UserError(f"{name} has the empty shape {shape}; every dimension must be at least 1")
    if channels_last and x.ndim < 3:
        raise UserError(f"{name} has the shape {shape} of a table; channels_last=True is for images and signals only")
    if channels_last is not None or x.ndim < 3:
        return
    what = "signals" if x.ndim == 3 else "images"
    if shape[-1] in (1, 3, 4) and min(shape[1:-1]) > 4:
        raise UserError(
            f"{name} has the shape {shape}, which looks like {what} with channels last; give channels_last=True, or "
            f"channels_last=False if dimension 1 holds {shape[1]} channels"
        )
    if x.dtype == torch.uint8 and x.ndim == 3 and shape[1] == shape[2]:
        raise UserError(
            f"{name} has the shape {shape}, which looks like grey images without a dimension of channels; give "
            f"{name}[:, None], or channels_last=False if dimension 1 holds {shape[1]} channels"
        )


def shape_of(x: Tensor) -> str:
    """Return the shape of one example of ``x``, for a message."""
    return str(list(x.shape[1:])) if x.ndim > 1 else "a number"


def kind_of(x: Tensor) -> str:
    """Return the name of the dtype of ``x``, for a message."""
    return str(x.dtype).removeprefix("torch.")
