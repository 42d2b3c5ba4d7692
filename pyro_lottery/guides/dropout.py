"""Monte Carlo dropout: a guide whose draws leave out whole inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import model_of
from pyro_lottery.guides.flat import FlatGuide
from pyro_lottery.kernels.layout import flatten

RATE = 0.1
"""The probability with which an input of a layer is left out."""


class McDropout(FlatGuide):
    """q(w): w = m·z/(1−p), where z, 0 with probability p = ``rate``, is shared by all weights of one input of a layer (Gal and Ghahramani 2016).

    The inputs are those of the network's linear, convolutional and attention layers but the first; of a Pyro model, the columns of its matrices but
    the first. The loc is m; weight decay applies to it, and the prior to the draw. There is no scale: that of each weight would be
    |m|·√(p/(1−p)), by which no score could rank. Raises ``UserError`` if ``rate`` is not between 0 and 1, and for a network of one layer.
    """

    takes_scales = False

    def __init__(self, model: Callable[..., Any], rate: float = RATE, *prototype_args: Any, create_plates: Any = None):
        super().__init__(model, *prototype_args, create_plates=create_plates)
        if not 0 < rate < 1:
            raise UserError(f"the rate of dropout must be between 0 and 1, got {rate}")
        self.rate = rate
        net = getattr(model_of(self), "net", None)
        inputs = _matrices(self.shapes) if net is None else _inputs(net, self.shapes)
        self.dropped = dict(list(inputs.items())[1:])
        """Sites whose inputs are left out: groups, and the dimension of a group's inputs."""
        if not self.dropped:
            raise UserError(
                "mc_dropout leaves out inputs of layers behind the first, and this network has none; use another guide"
            )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Set every site of the model to its loc without some inputs; returns the values by site, with the sites' shapes."""
        factors = []
        for name, shape in self.shapes.items():
            factor = self.loc.new_ones(()).expand(shape)
            if name in self.dropped:
                groups, dim = self.dropped[name]
                kept = torch.rand(groups * shape[dim], device=self.loc.device) >= self.rate
                # Every input of a group reaches the group's own part of the other dimension.
                factor = (
                    (kept / (1 - self.rate))
                    .view(groups, 1, shape[dim])
                    .expand(groups, shape[1 - dim] // groups, shape[dim])
                )
                factor = factor.reshape(shape[1 - dim], shape[dim])
                factor = (factor if dim == 1 else factor.T).reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)
            factors.append(flatten(factor))
        return self.draw_point(*args, factors=torch.cat(factors))


def _matrices(shapes: Mapping[str, Size]) -> dict[str, tuple[int, int]]:
    return {name: (1, 1) for name, shape in shapes.items() if len(shape) == 2}


def _inputs(net: nn.Module, shapes: Mapping[str, Size]) -> dict[str, tuple[int, int]]:
    """The groups, and the dimension of a group's inputs, of every weight of a layer with inputs."""
    found = {}
    for name, module in net.named_modules():
        for part in ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            site = f"{name}.{part}" if name else part
            if site not in shapes or len(shapes[site]) < 2:
                continue
            if isinstance(module, _ConvTransposeNd):
                found[site] = (1, 0)  # [inputs, outputs / groups, ...]
            elif isinstance(module, nn.Linear | _ConvNd | nn.MultiheadAttention):
                found[site] = (getattr(module, "groups", 1), 1)  # [outputs, inputs / groups, ...]
    return found


def mc_dropout(
    model: Callable[..., Any], rate: float = RATE, *prototype_args: Any, create_plates: Any = None
) -> McDropout:
    """A guide of Monte Carlo dropout (Gal and Ghahramani 2016): deterministic weights, of which draws leave out inputs with probability ``rate``.

    The other arguments are those of :func:`deterministic`.
    """
    return McDropout(model, rate, *prototype_args, create_plates=create_plates)
