"""The point family: deterministic training, or MAP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_lottery.guides.flat import FlatGuide


class Point(FlatGuide):
    """A Delta at loc for every site: maximum likelihood under ``priors.flat``, MAP under any other prior."""

    is_point = True

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Set every site of the model to its loc; returns the values by site, with the sites' shapes."""
        return self.draw_point(*args)


def deterministic(model: Callable[..., Any], *prototype_args: Any, create_plates: Any = None) -> Point:
    """A point guide: ordinary deterministic training with ``priors.flat``, MAP with another prior.

    It takes the model, the arguments of a forward pass and ``create_plates`` as :func:`mean_field` does, and no scale.
    """
    return Point(model, *prototype_args, create_plates=create_plates)
