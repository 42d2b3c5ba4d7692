"""BatchNorm's running statistics for weights that were not trained themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lottery import masks, training
from pyro_lottery.data import Data
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.training.checks import is_batch_norm

BATCH = 128


@torch.no_grad()
def update_batch_norm_(
    model: BayesianNetwork, weights: Mapping[str, Tensor], data: Data, state: training.TrainState, *, seed: int, level: int,
    steps: int | None = None,
) -> None:  # fmt: skip
    """Replace BatchNorm's running statistics by their means over the batches of one epoch at ``weights`` (Izmailov et al. 2018).

    The epoch is that of ``state`` for ``seed`` and ``level``, with its augmentation, or the first ``steps`` of its batches where the data are in
    memory. ``weights`` holds a tensor per site, of the site's shape; layers that transform their weights leave out those that are 0.
    """
    norms: list[Any] = [m for m in model.modules() if is_batch_norm(m) and m.running_mean is not None]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    left = masks.nonzero(weights)
    try:
        with training.epoch(model, data, state, batch_size=BATCH, seed=seed, level=level) as batches:
            for norm in norms:
                if norm.training:  # a frozen one keeps its statistics
                    norm.reset_running_stats()
                    norm.momentum = None  # a mean over all batches
            last = len(batches) if steps is None or batches.whole_only else min(steps, len(batches))
            while state.step < last:
                x, _ = batches.batch(state.step)
                with model.with_weights(weights, left):
                    model.outputs(x)
                state.step += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
