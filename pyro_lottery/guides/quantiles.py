"""Quantiles of a site's values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_lottery.errors import UserError
from pyro_lottery.guides.places import Place


def probabilities(quantiles: Any, like: Tensor) -> Tensor:
    """Numbers between 0 and 1 as a vector [n] of the dtype and device of ``like``; ``UserError`` for other numbers."""
    numbers = torch.as_tensor(quantiles, dtype=like.dtype, device=like.device).reshape(-1)
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise UserError(f"quantiles must be between 0 and 1, got {quantiles}")
    return numbers


def normal_quantiles(place: Place, loc: Tensor, scale: Tensor | None, quantiles: Any) -> Tensor:
    """Quantiles [n, *shape] of a site whose parameters are N(loc, scale²); loc itself where scale is 0 or None.

    For a simplex and the like, whose entries depend on each other, this is the image of the parameters' quantiles, as in
    Pyro.
    """
    steps = torch.special.ndtri(probabilities(quantiles, loc)).reshape(-1, *[1] * loc.dim())
    if scale is None:
        return place.value_of(loc.expand(len(steps), *loc.shape))
    steps = -steps if place.decreasing else steps
    return place.value_of(torch.where(scale > 0, loc + steps * scale, loc))
