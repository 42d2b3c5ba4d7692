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
from pyro_lottery.distributed import ALONE, Ranks
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
    ranks: Ranks = ALONE,
) -> Iterator[Epoch | StreamEpoch]:
    """The batches of epoch ``state.epoch``, within its random streams, with the network in training mode.

    Batches, augmentation and noise follow ``(seed, level, state.epoch)``, as in :func:`train`; ``samples`` is the number of
    noise samples a batch. Of ``ranks`` that divide the weight samples, each augments the batch for itself. An epoch that was left before its end goes on where it was left::

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
        seeds.rng(device, seed, "noise", level, state.epoch, *ranks.path),
        pyro.validation_enabled(False),
        training_mode(model, samples),
        _batches(data, batch_size, order, ranks, (seed, level, state.epoch)) as batches,
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
    data: Data, batch_size: int, order: torch.Generator, ranks: Ranks, path: tuple[int, int, int]
) -> Iterator[Epoch | StreamEpoch]:
    """The batches of one epoch, in the order that ``order`` draws; a stream is seeded by ``path`` (seed, level, epoch).

    Ranks that divide the images draw the augmentation of the whole batch, so that it is that of one process. Of ranks that
    divide the weight samples, each augments its own copy of the batch: the mean over ranks is then one over augmentations too,
    with the same expectation and less variance. Its generator is seeded anew at each step, so a checkpoint need not hold it.
    """
    if isinstance(data.train, Split):
        seed, *within = path

        def augmentation(step: int) -> torch.Generator:
            return seeds.generator(order.device, seed, "augment", *within, *ranks.path, step)

        by_rank = ranks.parallel == "samples" and ranks.rank > 0  # rank 0 has the augmentation of one process
        yield Epoch(data.train, batch_size, data.augment, order, ranks.least, augmentation if by_rank else None)
        return
    with StreamEpoch(data.train, *path) as batches:
        yield batches


@contextmanager
def training_mode(model: nn.Module, samples: int) -> Iterator[None]:
    """Put ``model`` in training mode, with BatchNorm's momentum m replaced by 1 − (1 − m)^(1/S) for S = ``samples``.

    A batch passes through the network once per weight sample; with this momentum, S passes move the running statistics as far
    as one pass does otherwise. Where some modules are in training mode and others in eval mode (a frozen BatchNorm), all stay
    in their modes.
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
