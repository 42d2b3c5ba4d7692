"""Parameters from scales, so that a saved scale comes back to the last bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def preimage(transform: Any, scale: Tensor) -> Tensor:
    """The parameter whose transform is exactly ``scale``, if there is one close to the inverse; a scale of 0 counts as 1.

    exp(log(s)) is not s in floating point. A saved scale came out of the transform, so a preimage exists close to the
    inverse; with it a ticket is restored bit for bit from the scale alone. The search goes through the inverse's
    neighbours, and through the inverses of numbers between the scale's neighbours, since parameters near 0 lie more
    densely than their scales.
    """
    scale = torch.where(scale == 0, 1.0, scale)
    best = transform.inv(scale)
    wrong = transform(best) != scale
    inverse, above = best, transform.inv(torch.nextafter(scale, scale.new_tensor(torch.inf)))
    up = down = best
    for step in range(1, 65):
        if not wrong.any():
            break
        up = torch.nextafter(up, up.new_tensor(torch.inf))
        down = torch.nextafter(down, down.new_tensor(-torch.inf))
        between = step / 32 * (above - inverse)
        for candidate in (up, down, inverse + between, inverse - between):
            hit = wrong & (transform(candidate) == scale)
            best = torch.where(hit, candidate, best)
            wrong = wrong & ~hit
    return best
