"""The batches of one epoch, and the network's mode while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import nn

from pyro_lottery import seeds
from pyro_lottery.data import Data, Epoch, Split, StreamEpoch
from pyro_lottery.distributed import ALONE, Alone
from pyro_lottery.errors import UserError
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.priors import SitePrior
from pyro_lottery.training.checks import is_batch_norm
from pyro_lottery.training.state import TrainState


@contextmanager
def epoch(
    model: BayesianNetwork,
    data: Data,
    state: TrainState,
    *,
    batch_size: int = 128,
    samples: int = 1,
    seed: int = 0,
    level: int = 0,
    ranks: Alone = ALONE,
) -> Iterator[Epoch | StreamEpoch]:
    """The batches of epoch ``state.epoch``, within its random streams, with the network in training mode.

    Batches, augmentation and noise follow ``(seed, level, state.epoch)``, as in :func:`train`; ``samples`` is the number of
    noise samples a batch. An epoch that was left before its end goes on where it was left::

        with state.using(optimizer), training.epoch(model, data, state) as batches:
            while state.step < len(batches):
                x, y = batches.batch(state.step)
                training.step(model, guide, elbo, optimizer, x, y, sums=state.sums)
                state.step += 1
        state.next_epoch()

    Raises ``UserError`` where the epoch has no step ``state.step``, or is read from a loader and was left before its end.
    """
    device = data.train.device
    order = seeds.generator(device, seed, "batches", level, state.epoch)
    with (
        seeds.stream(device, seed, "noise", level, state.epoch, *ranks.path),
        pyro.validation_enabled(False),
        training_mode(model, samples),
        _batches(data, batch_size, order, ranks.least, (seed, level, state.epoch)) as batches,
    ):
        _check_step(state, batches)
        state.enter_epoch(order)
        try:
            yield batches
            if state.step == len(batches):
                batches.end()
        finally:
            state.leave_epoch()


def _check_step(state: TrainState, batches: Epoch | StreamEpoch) -> None:
    if state.step >= len(batches):
        raise UserError(
            f"the TrainState is at step {state.step} of an epoch of {len(batches)} steps; call its next_epoch()"
        )
    if state.step and batches.whole_only:
        raise UserError(
            f"the TrainState is at step {state.step} of an epoch, but a loader is read from its start; give "
            f"TrainState({state.epoch})"
        )


@contextmanager
def _batches(
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
