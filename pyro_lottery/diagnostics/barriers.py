"""What lies between two posteriors of one network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lottery.types import Posterior, Sites


@dataclass(frozen=True)
class Barrier:
    """A loss on the straight line between two posteriors."""

    at: tuple[float, ...]
    """Places on the line, from 0 (the first posterior) to 1 (the second)."""
    losses: tuple[float, ...]
    """The loss at each place."""

    @property
    def height(self) -> float:
        """max over a of loss(a) − ((1 − a) loss(0) + a loss(1)): 0 where the line is nowhere above its ends' chord (Frankle et al. 2020). NaN if a loss is."""
        first, last = self.losses[0], self.losses[-1]
        if any(map(math.isnan, self.losses)):
            return math.nan
        return max(loss - ((1 - a) * first + a * last) for a, loss in zip(self.at, self.losses, strict=True))


def barrier(
    a: tuple[Posterior, Sites], b: tuple[Posterior, Sites], loss: Callable[[Posterior, Sites], float], points: int = 11
) -> Barrier:
    """``loss`` at ``points`` places between two posteriors with their network's other values.

    loc and the other values are interpolated linearly, scales geometrically, or linearly where one of them is 0 since the weight is pruned; all tensors have the sites' shapes. Values that are
    whole numbers, such as BatchNorm's count of batches, stay those of ``a``.
    """
    places = tuple(i / (points - 1) for i in range(points))
    return Barrier(places, tuple(loss(*_between(a, b, place)) for place in places))


def _between(a: tuple[Posterior, Sites], b: tuple[Posterior, Sites], t: float) -> tuple[Posterior, Sites]:
    def line(one: Sites, other: Sites) -> Sites:
        return {n: v.lerp(other[n].to(v), t) if v.is_floating_point() else v for n, v in one.items()}

    (p, net), (q, other) = a, b
    scale = None
    if p.scale is not None and q.scale is not None:
        scale = {n: _between_scales(s, q.scale[n], t) for n, s in p.scale.items()}
    return Posterior(line(p.loc, q.loc), scale, p.prunable), line(net, other)


def _between_scales(a: Tensor, b: Tensor, t: float) -> Tensor:
    return torch.where((a > 0) & (b > 0), a ** (1 - t) * b**t, a.lerp(b, t))
