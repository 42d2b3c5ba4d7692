"""Gradual pruning within one training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from pyro_lottery import masks, scores
from pyro_lottery.schedules.moving import Move
from pyro_lottery.types import Mask


@dataclass(frozen=True)
class Gradual:
    """d(t) = d + (1 − d)(1 − t)³ for progress t from 0 to 1 (Zhu and Gupta 2017): prunes fast while there is much to prune.

    The weights with the lowest ``score`` go, over all layers together; those that are pruned do not come back.
    """

    density: float
    """The final density d."""
    score: scores.Score

    def density_at(self, progress: float) -> float:
        """The density after ``progress``, from 0 to 1.

        >>> Gradual(0.1, scores.snr).density_at(1.0)
        0.1
        """
        return self.density + (1 - self.density) * (1 - progress) ** 3

    def move(self, at: Move) -> Mask:
        """The mask with the density of ``at.progress``; at least one weight is left."""
        density = Fraction(str(self.density_at(at.progress)))  # the decimal number that it prints as
        count = max(1, math.ceil(density * masks.total(at.mask)))
        return masks.shrink_to(at.mask, scores.ranks(self.score, at.posterior, at.context), count)
