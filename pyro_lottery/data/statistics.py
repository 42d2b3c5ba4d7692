"""Mean, standard deviation and normalisation of inputs, computed in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError

_CHUNK = 2**18
"""Number of values that are converted to double precision at a time."""


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
            raise not_finite(name, x)
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
            raise not_finite(name, x)
    return out


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


def not_finite(name: str, x: Tensor) -> UserError:
    """Return the error for a tensor with values that are not finite, or too large for float32."""
    if len(places := (~x.isfinite()).nonzero()):
        place = places[0].tolist()
        return UserError(f"{name}{place} is {x[tuple(place)].item()}; fill or drop values that are not finite")
    return UserError(
        f"{name} holds numbers up to {float(x.double().abs().max()):.3g}, too large for float32; scale them"
    )


def mean_and_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel of uint8 inputs, divided by 255; the latter is 1 where constant."""
    # The histogram of each channel gives exact results without a float copy of the data set.
    values = torch.arange(256, dtype=torch.double) / 255
    parts = []
    for channels in pixels.split(256, 1):  # a table may have thousands of features
        counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in channels.unbind(1)]).cpu()
        weights = counts.double() / counts.sum(1, keepdim=True)
        mean = weights @ values
        std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
        constant = (counts > 0).sum(1) == 1  # its standard deviation of 0 would divide by zero
        parts.append((mean.float(), torch.where(constant, 1.0, std).float()))
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, std
