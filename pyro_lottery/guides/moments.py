"""Mean and standard deviation of what a guide draws."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import seeds
from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import device_of, in_network_order
from pyro_lottery.guides.places import Place
from pyro_lottery.threads import TURN


def moments(guide: AutoGuide, places: Mapping[str, Place], draws: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and standard deviation of every site's parameters over ``draws`` draws, the same draws each time.

    By Welford's recurrence, so that memory does not grow with the number of draws.
    """
    if draws < 2:
        raise UserError(f"draws must be at least 2 for a standard deviation, got {draws}")
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    with TURN, seeds.rng(device_of(guide), 0, "posterior"), poutine.block():
        for count in range(1, draws + 1):
            for name, drawn in guide().items():
                value = places[name].real_of(drawn)
                before = mean.get(name, torch.zeros_like(value))
                mean[name] = before + (value - before) / count
                square[name] = square.get(name, 0.0) + (value - before) * (value - mean[name])
    mean = in_network_order(guide, mean)
    return mean, {name: (square[name] / (draws - 1)).sqrt() for name in mean}
