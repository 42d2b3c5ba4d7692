"""Checks of the user's targets and of the names of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lottery.data.arrays import Parts, as_tensor, kind_of, shape_of
from pyro_lottery.data.statistics import as_float32, not_finite
from pyro_lottery.errors import UserError
from pyro_lottery.names import can_be_shown


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
                f"{name} is {kind_of(y)}, but train_y is {kind_of(train)}; give integers (classes) or floats (real values) for both"
            )
        if y.shape[1:] != train.shape[1:]:
            raise UserError(
                f"targets of {name} have the shape {shape_of(y)}, but those of train_y {shape_of(train)}; give the same shape"
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
                raise not_finite(name, y)
        return {name: as_float32(name, y.reshape(len(y), -1)).view(y.shape) for name, y in found.items()}, None
    for name, y in found.items():
        if y.ndim != 1:
            right = f"give [n]: {name}[:, 0]" if y.numel() == len(y) else "give [n]"
            raise UserError(
                f"{name} is {kind_of(y)} {list(y.shape)}, and integers are classes; {right}, or floats for real values, counts "
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
            f"train_y holds the label {present[-1]}, but classes= names {len(classes)} classes, 0 to {len(classes) - 1}; name all"
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
    """Return the names of the classes as a tuple of strings. Raises ``UserError`` if a name occurs twice, or has characters that cannot be shown."""
    if classes is None:
        return None
    if isinstance(classes, str | int):
        raise UserError(f"classes={classes!r}; give the names of all classes: ('cat', 'dog')")
    names = tuple(str(name) for name in classes)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"classes= holds {twice[0]!r} twice; give every class a different name")
    if odd := [name for name in names if not can_be_shown(name)]:
        raise UserError(
            f"classes= holds {odd[0]!r}, with characters that cannot be shown, such as a line's end; use others"
        )
    return names
