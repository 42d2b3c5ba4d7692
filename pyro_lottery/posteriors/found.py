"""Loc and scale of a guide that was trained as a point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import guides, masks, seeds
from pyro_lottery.data import Data, Split, batch, in_memory, shuffle
from pyro_lottery.errors import UserError
from pyro_lottery.guides.found import Found, Laplace, Swag, snapshots
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.posteriors.batch_norm import update_batch_norm_
from pyro_lottery.posteriors.curvature import ggn_diagonal, prior_precision
from pyro_lottery.training import TrainState, steps_in
from pyro_lottery.types import Mask

EXAMPLES = 1024
"""Training examples, at most, from which the curvature is estimated: the gradient of each is taken for each output."""
BATCH = 128


def is_found(guide: AutoGuide) -> bool:
    """Whether the scales of ``guide`` are found after its training, by :func:`find_scales_`."""
    return isinstance(guide, Found)


def find_scales_(
    model: BayesianNetwork,
    guide: AutoGuide,
    data: Data,
    mask: Mask,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    level: int,
) -> None:
    """Set the scales of a guide that was trained as a point under ``mask``, until epoch ``epochs``; other guides stay as they are.

    Call it under :func:`pyro_lottery.handlers.sparsify`.

    - ``laplace``: 1/scale² = (N/n)·Σ diag(JᵀΛJ)/T − ∂² log p/∂w², with the sum over n of the N training examples (all, or ``EXAMPLES``
      by ``seed``), T the KL temperature and p the prior.
    - ``swag``: loc and scale are mean and standard deviation of the weights of the last steps. BatchNorm's statistics are
      those of the training data at the new loc.

    Raises ``UserError`` if a scale would not be finite and positive.
    """
    if isinstance(guide, Laplace):
        _laplace_(model, guide, data, mask, seed, level)
    elif isinstance(guide, Swag):
        _swag_(model, guide, data, mask, epochs * steps_in(data.train, batch_size), seed, level, epochs)


def _laplace_(model: BayesianNetwork, guide: Laplace, data: Data, mask: Mask, seed: int, level: int) -> None:
    posterior = guides.posterior(guide)
    values = masks.apply(mask, posterior).loc
    split = in_memory(data.train)
    generator = seeds.generator(split.device, seed, "curvature", level)
    order = shuffle(len(split), BATCH, generator)
    taken = torch.cat(order)[:EXAMPLES].split(BATCH)
    count = sum(map(len, taken))
    curvature = ggn_diagonal(model, values, mask, _batches(split, taken, generator))
    prior = prior_precision(model, values)
    times = len(split) / count / model.kl_temperature
    scale = {}
    for name, sums in curvature.items():
        precision = times * sums + prior[name]
        kept = precision[mask[name]] if name in mask else precision
        if not bool((kept > 0).all() and kept.isfinite().all()):
            raise UserError(
                f"laplace finds no positive curvature at {int((~(kept > 0)).sum())} weights of {name!r}, on which neither data nor prior have an "
                "effect; use a prior with curvature everywhere, such as normal"
            )
        scale[name] = precision.rsqrt()
    guides.set_posterior_(guide, masks.apply(mask, replace(posterior, scale=scale)))


def _batches(split: Split, taken: Any, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for indices in taken:
        x, y = batch(split, indices, "none", generator)
        if not isinstance(x, Tensor):
            raise UserError("laplace needs a network of one input tensor; use swag")
        yield x, y


def _swag_(
    model: BayesianNetwork, guide: Swag, data: Data, mask: Mask, steps: int, seed: int, level: int, epochs: int
) -> None:
    count = snapshots(steps, steps)
    if count < 2:
        raise UserError(
            f"swag needs at least two steps in the last quarter of a training, which has {steps}; use more --epochs"
        )
    mean, squares = guide.unpack(guide.mean.data), guide.unpack(guide.squares.data)
    scale = {name: (value / (count - 1)).sqrt().clamp(min=math.sqrt(1e-30)) for name, value in squares.items()}
    posterior = replace(guides.posterior(guide), loc=mean, scale=scale)
    guides.set_posterior_(guide, masks.apply(mask, posterior))
    weights = masks.apply(mask, guides.posterior(guide)).loc
    update_batch_norm_(model, weights, data, TrainState(epochs), seed=seed, level=level)
