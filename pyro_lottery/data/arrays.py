"""Checks and normalisation of the user's arrays, whose statistics are computed in double precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.machine import memory

Parts = Mapping[str, Tensor]
"""Tensors by the argument names of ``from_tensors``: train_x, test_x and possibly val_x, or the same with y."""
_CHUNK = 2**18
"""Number of values that are converted to double precision at a time."""


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if arguments, or columns or rows of DataFrames, are in the wrong order."""
    nested = {name for name, value in given.items() if isinstance(value, Tensor) and value.is_nested}  # without a shape
    shapes = {name: () if name in nested else getattr(value, "shape", ()) for name, value in given.items()}
    if len(shapes["test_x"]) == 1 < len(shapes["train_y"]) and shapes["train_y"][1:] == shapes["train_x"][1:]:
        raise UserError(
            "train_y looks like inputs and test_x like targets; the order is train_x, train_y, test_x, test_y, while "
            "scikit-learn's train_test_split returns train_x, test_x, train_y, test_y"
        )
    for part in ("test", "val"):
        columns, others = (getattr(given.get(f"{p}_x"), "columns", None) for p in ("train", part))
        if columns is not None and others is not None and list(columns) != list(others):
            raise UserError(
                f"the columns of {part}_x differ from those of train_x in name or order; give {part}_x[train_x.columns]"
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
                f"examples of {name} have the shape {_of(x)}, but those of train_x {_of(train)}; give the same shape"
            )
        if (x.dtype == torch.uint8) != (train.dtype == torch.uint8):
            raise UserError(
                f"{name} is {_kind(x)}, but train_x is {_kind(train)}; give both as uint8, which is divided by 255, or neither"
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


def check_targets(
    given: Mapping[str, Any], inputs: Parts, classes: Sequence[str] | None
) -> tuple[dict[str, Tensor], int | None]:
    """Return copies of the targets, int64 [n] or float32 [n, ...], and the number of classes (None for real values).

    Raises ``UserError`` if they have the wrong type or shape, or labels that are not 0 to C − 1.
    """
    found = {name: as_tensor(name, value) for name, value in given.items()}
    train = found["train_y"]
    for name, y in found.items():
        x_name = name[:-1] + "x"
        if y.ndim == 0 or len(y) != len(inputs[x_name]):
            count = f"{len(y):,} targets" if y.ndim else "a single number"
            raise UserError(
                f"{x_name} has {len(inputs[x_name]):,} examples, but {name} has {count}; each example needs one target"
            )
        if y.is_floating_point() != train.is_floating_point():
            raise UserError(
                f"{name} is {_kind(y)}, but train_y is {_kind(train)}; give integers (classes) or floats (real values) for both"
            )
        if y.shape[1:] != train.shape[1:]:
            raise UserError(
                f"targets of {name} have the shape {_of(y)}, but those of train_y {_of(train)}; give the same shape"
            )
        if is_one_hot(y):
            raise UserError(f"{name} is one-hot, {list(y.shape)}; give class indices: {name}.argmax(1)")
    if train.is_floating_point():
        if classes is not None:
            raise UserError("classes= is given, but train_y holds floats, which are real values; give integer labels")
        for name, y in found.items():
            if not y.numel():
                raise UserError(f"{name} has the empty shape {list(y.shape)}; every dimension must be at least 1")
            if not bool(y.isfinite().all()):
                raise _not_finite(name, y)
        return {name: as_float32(name, y.reshape(len(y), -1)).view(y.shape) for name, y in found.items()}, None
    for name, y in found.items():
        if y.ndim != 1:
            right = f"give [n]: {name}[:, 0]" if y.numel() == len(y) else "give [n]"
            raise UserError(
                f"{name} is {_kind(y)} {list(y.shape)}, and integers are classes; {right}, or floats for real values, counts "
                "or several labels per example"
            )
    labels = {name: y.to(torch.int64, copy=True) for name, y in found.items()}
    return labels, _check_labels(labels, classes)


def is_one_hot(y: Tensor) -> bool:
    """Return whether every row of ``y`` [n, k] holds exactly one 1 and otherwise 0s."""
    if y.ndim != 2 or y.shape[1] < 2:
        return False
    ones = y == 1
    return bool((ones | (y == 0)).all()) and bool((ones.sum(1) == 1).all())


def _check_labels(labels: Parts, classes: Sequence[str] | None) -> int:
    for name, y in labels.items():
        if (least := int(y.min())) < 0:
            raise UserError(
                f"{name} holds the label {least}, but classes are 0, 1, ...; renumber them or leave these examples out "
                "(for real values, give floats)"
            )
    present = labels["train_y"].unique().tolist()
    if classes is not None and len(classes) <= present[-1]:
        raise UserError(
            f"train_y holds the label {present[-1]}, but classes= names {len(classes)} classes, 0 to {len(classes) - 1}"
        )
    if len(present) < 2:
        raise UserError("the data have one class; a classifier needs at least two")
    missing = next((i for i, label in enumerate(present) if i != label), None)
    if missing is not None and classes is None:
        if present == list(range(1, len(present) + 1)):
            raise UserError(f"labels of train_y begin at 1, but classes are 0 to {len(present) - 1}; subtract 1")
        raise UserError(
            f"train_y has labels up to {present[-1]} but no example of class {missing}; renumber them "
            "(np.unique(train_y, return_inverse=True)) or name all classes with classes= (for real values or counts, give "
            "floats)"
        )
    for name, y in labels.items():
        if others := sorted(set(y.unique().tolist()) - set(present)):
            raise UserError(
                f"{name} holds the label {others[0]}, which train_y does not hold; add training examples of it"
            )
    return present[-1] + 1 if classes is None else len(classes)


def check_names(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of the classes as a tuple of strings. Raises ``UserError`` if a name occurs twice."""
    if classes is None:
        return None
    if isinstance(classes, str | int):
        raise UserError(f"classes={classes!r}; give the names of all classes: ('cat', 'dog')")
    names = tuple(str(name) for name in classes)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"classes= holds {twice[0]!r} twice; give every class a different name")
    return names


def statistics(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each feature or channel (dimension 1), in double precision.

    If all values are equal, the mean is exactly that value and the standard deviation 0. Raises ``UserError``, which calls
    the tensor ``name``, for values that are not finite or too large.
    """
    # numpy sums in one thread, so the bits do not depend on the number of threads.
    count = x.numel() // x.shape[1]
    low, high, total = np.inf, -np.inf, np.zeros(x.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        for part in _chunks(x):
            low, high = np.minimum(low, part.min((0, 2))), np.maximum(high, part.max((0, 2)))
            total = total + part.sum((0, 2))
        if not (np.isfinite(total) & np.isfinite(high - low)).all():
            raise _not_finite(name, x)
    mean, constant = total / count, high == low
    spread = np.where(constant, 1.0, high - low)  # dividing by it keeps squares from overflow and underflow
    error, squares = np.zeros_like(mean), np.zeros_like(mean)
    for part in _chunks(x):
        deviation = (part - mean[:, None]) / spread[:, None]
        error, squares = error + deviation.sum((0, 2)), squares + np.square(deviation).sum((0, 2))
    error = error / count  # rounding error of the mean, in units of spread
    std = spread * np.sqrt(np.maximum(squares / count - error**2, 0))
    mean, std = np.where(constant, low, mean + spread * error), np.where(constant, 0.0, std)
    return torch.from_numpy(mean).to(x.device), torch.from_numpy(std).to(x.device)


def _chunks(x: Tensor) -> Iterator[Any]:
    """Yield all examples, some at a time, in double precision as numpy arrays [examples, channels, values]."""
    for part in x.split(max(1, _CHUNK // x[0].numel())):
        yield part.double().cpu().reshape(len(part), x.shape[1], -1).numpy()


def normalized(name: str, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(x − mean) / std`` as a new float32 tensor, computed in double precision.

    Raises ``UserError``, which calls the tensor ``name``, if a value is not finite.
    """
    per_channel = (-1, *(1,) * (x.ndim - 2))
    mean, std = mean.view(per_channel), std.view(per_channel)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    size = max(1, _CHUNK // x[0].numel())
    for into, part in zip(out.split(size), x.split(size), strict=True):
        into.copy_((part.double() - mean) / std)
        if not bool(into.isfinite().all()):
            raise _not_finite(name, x)
    return out


def _not_finite(name: str, x: Tensor) -> UserError:
    if len(places := (~x.isfinite()).nonzero()):
        place = places[0].tolist()
        return UserError(f"{name}{place} is {x[tuple(place)].item()}; fill or drop values that are not finite")
    return UserError(
        f"{name} holds numbers up to {float(x.double().abs().max()):.3g}, too large for float32; scale them"
    )


def as_float32(name: str, x: Tensor) -> Tensor:
    """Return a copy of ``x`` as float32. Raises ``UserError`` if float32 cannot resolve the differences of its values."""
    mean, std = statistics(name, x)
    exact = x.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.float32)
    if not exact and bool((lost := (mean.abs() * 2**-24 > 1e-3 * std) & (std > 0)).any()):
        at = int(lost.nonzero()[0])
        raise UserError(
            f"{name} is about {float(mean[at]):.10g} with a standard deviation of {float(std[at]):.3g}, too small a "
            "difference for float32; subtract an offset"
        )
    return normalized(name, x, torch.zeros_like(mean), torch.ones_like(std))


def _of(x: Tensor) -> str:
    return str(list(x.shape[1:])) if x.ndim > 1 else "a number"


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
