"""Small files of sparse networks: one bit per prunable weight, and values only for the weights that survive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.names import grouped, joined

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
}  # fmt: skip
"""How loc and scale are stored, by name."""
KEY = "packed"
Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by group (``names.GROUPS``) and name."""


def pack(groups: Groups, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the facts of a small file.

    loc and scale [survivors] hold the surviving weights in the order of the site's elements, or all of a site without a
    mask. int8 stores loc as q·step with one step for each row of the weight's first dimension, step = max|loc|/127, and scale
    as exp(low + (q + 127)·step), so that its relative error is the same everywhere. Raises ``UserError`` for an unknown ``dtype``,
    and if a value overflows it.
    """
    if dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    masks, tensors = groups["mask"], joined({"net": groups["net"]})
    for name, mask in masks.items():
        tensors[f"mask/{name}"] = torch.from_numpy(np.packbits(mask.cpu().bool().numpy().reshape(-1)))
    for group in ("loc", "scale"):
        for name, value in groups[group].items():
            kept = value.detach().cpu().float()
            rows = _rows(kept.shape)
            if name in masks:
                here = masks[name].cpu().bool().reshape(-1)
                kept, rows = kept.reshape(-1)[here], rows[here]
            kept = kept.reshape(-1)
            if not bool(kept.isfinite().all()):
                raise UserError(f"the {group} of {name!r} holds values that are not finite, which no file can keep")
            if dtype == "int8":
                tensors |= _quantised(f"{group}/{name}", kept, rows, len(value) if value.ndim > 1 else 1)
                continue
            tensors[f"{group}/{name}"] = stored = kept.to(DTYPES[dtype])
            vanished = group == "scale" and bool((stored == 0).any())  # a weight that survives has a scale
            if vanished or not bool(stored.isfinite().all()):
                raise UserError(
                    f"--dtype {dtype} cannot hold the {group} of {name!r}, from {float(kept.abs().min()):g} to "
                    f"{float(kept.abs().max()):g}; use bf16"
                )
    shapes = {name: list(value.shape) for name, value in groups["loc"].items()}
    return tensors, {KEY: dtype, "shapes": shapes}


def unpack(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The groups that :func:`pack` was given: masks as uint8, values in float32, 0 at pruned weights.

    Raises ``KeyError``, ``TypeError`` or ``ValueError`` if the file was not made by it. Takes no more than some hundred
    times the memory of the tensors, where a mask prunes almost everything.
    """
    dtype, shapes = info[KEY], {name: _shape(shape) for name, shape in info["shapes"].items()}
    if dtype not in DTYPES:
        raise ValueError(f"values of kind {dtype!r}")
    found = grouped({key: value for key, value in tensors.items() if key.startswith("net/")})
    for key, bits in tensors.items():
        group, _, name = key.partition("/")
        if group == "mask":
            count = math.prod(shapes[name])
            if bits.dtype != torch.uint8 or bits.shape != ((count + 7) // 8,):
                raise ValueError(f"{key} does not fit the shape {shapes[name]}")
            flat = np.unpackbits(bits.numpy(), count=count)
            found["mask"][name] = torch.from_numpy(flat).view(shapes[name])
    for key, stored in tensors.items():
        group, _, name = key.partition("/")
        if group not in ("loc", "scale"):
            continue
        if stored.dtype != DTYPES[dtype] or stored.ndim != 1:
            raise ValueError(f"{key} is {stored.dtype} {list(stored.shape)}")
        mask, rows = found["mask"].get(name), None
        count = math.prod(shapes[name]) if mask is None else int(mask.sum())
        if len(stored) != count:
            raise ValueError(f"{key} has {len(stored)} values; expected {count}")
        here = None if mask is None else mask.view(-1).bool()
        if dtype == "int8":
            rows = _rows(torch.Size(shapes[name]))
            values = _restored(key, stored, rows if here is None else rows[here], tensors)
        else:
            values = stored.float()
        if here is not None:
            whole = torch.zeros(len(here))
            whole[here] = values
            values = whole
        found[group][name] = values.view(shapes[name])
    return found


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"{shape!r} is not a shape")
    return tuple(shape)


def _rows(shape: torch.Size) -> Tensor:
    """For each element of a tensor, the index of its row in the first dimension; 0 for vectors."""
    count = math.prod(shape)
    return torch.arange(count) // max(1, count // shape[0]) if len(shape) > 1 and count else torch.zeros(count).long()


def _quantised(key: str, values: Tensor, rows: Tensor, count: int) -> dict[str, Tensor]:
    if key.startswith("loc/"):
        most = torch.zeros(count).scatter_reduce(0, rows, values.abs(), "amax")
        step = most.clamp_min(torch.finfo(torch.float32).tiny) / 127
        return {key: (values / step[rows]).round().to(torch.int8), f"step/{key}": step}
    logs = values.clamp_min(torch.finfo(torch.float32).tiny).log()
    low, high = (logs.min(), logs.max()) if len(logs) else (torch.zeros(()), torch.zeros(()))
    step = (high - low).clamp_min(1e-6) / 254
    return {key: ((logs - low) / step - 127).round().to(torch.int8), f"step/{key}": torch.stack((low, step))}


def _restored(key: str, stored: Tensor, rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    step = tensors[f"step/{key}"]
    wanted = int(rows.max()) + 1 if key.startswith("loc/") and len(rows) else 0
    if (
        step.ndim != 1
        or step.dtype != torch.float32
        or len(step) < wanted
        or (key.startswith("scale/") and len(step) != 2)
    ):
        raise ValueError(f"step/{key} is {step.dtype} {list(step.shape)}")
    if key.startswith("loc/"):
        return stored.float() * step[rows]
    low, each = step
    return (low + (stored.float() + 127) * each).exp()
