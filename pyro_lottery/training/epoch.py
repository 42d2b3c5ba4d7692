"""The batches of one epoch, and the network's mode while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyro_lottery.data import Data, Epoch, Split, StreamEpoch
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.priors import SitePrior
from pyro_lottery.training.checks import is_batch_norm


@contextmanager
def batches_of(
    data: Data, batch_size: int, order: torch.Generator, least: int, path: tuple[int, int, int]
) -> Iterator[Epoch | StreamEpoch]:
    """One epoch's batches, whose order follows ``order``, or of a stream ``path``: seed, level and epoch."""
    if isinstance(data.train, Split):
        yield Epoch(data.train, batch_size, data.augment, order, least)
        return
    with StreamEpoch(data.train, *path) as batches:
        yield batches


@contextmanager
def training_mode(model: nn.Module, samples: int) -> Iterator[None]:
    """Training mode in which a batch weighs the same in BatchNorm's running statistics, however many weight samples
    it passes through: with momentum m and S passes, 1 − (1 − m)^(1/S) a pass makes m together.

    A network of which some modules are in training mode and others, a frozen BatchNorm say, are not keeps both as they are.
    """
    layers: list[Any] = [m for m in model.modules() if is_batch_norm(m) and m.momentum]
    before = [layer.momentum for layer in layers]
    own = {m: m.training for m in model.modules() if not isinstance(m, BayesianNetwork | SitePrior)}
    model.train()
    if len(set(own.values())) == 2:
        for module, training in own.items():
            module.training = training
    for layer in layers:
        layer.momentum = 1 - (1 - layer.momentum) ** (1 / samples)
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
