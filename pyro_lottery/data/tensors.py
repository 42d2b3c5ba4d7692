"""Data sets from the user's own arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyro_lottery.data.arrays import check_arguments, check_inputs
from pyro_lottery.data.batches import Split, check_augment
from pyro_lottery.data.splits import Data, checksum_of
from pyro_lottery.data.statistics import as_float32, mean_and_std, normalized, statistics
from pyro_lottery.data.targets import check_names, check_targets
from pyro_lottery.errors import UserError


def from_tensors(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    *,
    val_x: Any = None,
    val_y: Any = None,
    normalize: bool = True,
    augment: str = "none",
    classes: Sequence[str] | None = None,
    channels_last: bool | None = None,
) -> Data:
    """Make a :class:`Data` from torch tensors, numpy arrays or DataFrames, which are copied.

    Inputs are [n, features], [n, channels, length], [n, channels, height, width] and so on, of any real dtype; with
    ``channels_last``, the last dimension holds the channels. They are normalised by the mean and standard deviation of each
    feature or channel over the training set, computed in double precision. With ``normalize=False``, uint8 inputs are
    divided by 255 and others stay as they are. ``data.train.normalize(x)`` normalises new inputs (channels first).

    Integer targets [n] are classes, 0 to C − 1. Float targets [n, ...] are real values, even if they are whole numbers, and
    are not normalised. ``classes`` names the classes; without it, every class needs a training example. ``augment`` is
    ``none`` or, for images, ``crop`` (padding has the value that was 0 before normalisation) or ``crop_flip``. The data are
    on the device of ``train_x`` if that is a tensor. Raises ``UserError`` for inputs or targets that are not usable.
    """
    given = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    if (val_x is None) != (val_y is None):
        raise UserError("val_x and val_y belong together; give both or neither")
    given |= {} if val_x is None else {"val_x": val_x, "val_y": val_y}
    check_arguments(given)
    inputs = check_inputs({name: v for name, v in given.items() if name.endswith("_x")}, channels_last)
    device, train = inputs["train_x"].device, inputs["train_x"]
    inputs = {name: x.to(device) for name, x in inputs.items()}
    check_augment(augment, train)
    names = check_names(classes)
    targets, num_classes = check_targets({n: v for n, v in given.items() if n.endswith("_y")}, inputs, names)
    targets = {name: y.to(device) for name, y in targets.items()}
    checksum = checksum_of(inputs, targets, normalize)
    if train.dtype == torch.uint8:
        mean, std = mean_and_std(train) if normalize else (torch.zeros(train.shape[1]), torch.ones(train.shape[1]))
        inputs = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    elif normalize:
        mean, std = statistics("train_x", train)
        std = torch.where(std == 0, 1.0, std)
        inputs = {name: normalized(name, x, mean, std) for name, x in inputs.items()}
    else:
        mean, std = (v.double() for v in (torch.zeros(train.shape[1]), torch.ones(train.shape[1])))
        inputs = {name: as_float32(name, x) for name, x in inputs.items()}
    splits = {
        part: Split(inputs[f"{part}_x"], targets[f"{part}_y"], mean.to(device), std.to(device))
        for part in ("train", "test", "val")
        if f"{part}_x" in inputs
    }
    return Data(splits["train"], splits["test"], splits.get("val"), num_classes, augment, checksum, names)
