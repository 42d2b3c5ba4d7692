"""Monte Carlo dropout: a guide whose draws leave out whole inputs of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import model_of
from pyro_lottery.guides.flat import FlatGuide
from pyro_lottery.kernels.layout import flatten

RATE = 0.1
"""The probability with which an input of a layer is left out."""


class McDropout(FlatGuide):
    """q(w): w = m·z/(1−p), where z, 0 with probability p = ``rate``, is shared by all weights of one input of a layer (Gal and Ghahramani 2016).

    The inputs are those of the network's prunable layers but the first: the second dimension of their weights. The loc is m, to which prior
    and weight decay apply. There is no scale: that of each weight would be |m|·√(p/(1−p)), by which no score could rank. Raises
    ``UserError`` if ``rate`` is not between 0 and 1.
    """

    def __init__(self, model: Callable[..., Any], rate: float = RATE, *prototype_args: Any, create_plates: Any = None):
        super().__init__(model, *prototype_args, create_plates=create_plates)
        if not 0 < rate < 1:
            raise UserError(f"the rate of dropout must be between 0 and 1, got {rate}")
        self.rate = rate
        prunable = getattr(model_of(self), "prunable", self.shapes)
        self.dropped = [name for name, shape in self.shapes.items() if name in prunable and len(shape) > 1][1:]
        """The sites whose inputs are left out."""

    takes_scales = False

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Set every site of the model to its loc without some inputs; returns the values by site, with the sites' shapes."""
        factors = []
        for name, shape in self.shapes.items():
            factor = self.loc.new_ones(())
            if name in self.dropped:
                inputs = torch.rand(shape[1], device=self.loc.device) >= self.rate
                factor = (inputs / (1 - self.rate)).view(1, -1, *[1] * (len(shape) - 2))
            factors.append(flatten(factor.expand(shape)))
        return self.draw_point(*args, factors=torch.cat(factors))


def mc_dropout(
    model: Callable[..., Any], rate: float = RATE, *prototype_args: Any, create_plates: Any = None
) -> McDropout:
    """A guide of Monte Carlo dropout (Gal and Ghahramani 2016): deterministic weights, of which draws leave out inputs with probability ``rate``.

    The other arguments are those of :func:`mean_field`.
    """
    return McDropout(model, rate, *prototype_args, create_plates=create_plates)
