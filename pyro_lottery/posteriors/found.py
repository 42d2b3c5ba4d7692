"""Loc and scale of a guide that was trained as a point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import guides, masks, seeds, training
from pyro_lottery.data import Data, Split, in_memory
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.errors import UserError
from pyro_lottery.guides.found import Found, Laplace, Swag, snapshots
from pyro_lottery.guides.langevin import Sgld
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.posteriors.batch_norm import update_batch_norm_
from pyro_lottery.posteriors.curvature import ggn_diagonal, prior_precision
from pyro_lottery.types import Mask

EXAMPLES = 1024
"""Training examples, at most, from which the curvature is estimated: the gradient of each is taken for each output."""
BATCH = 128


def find_scales_(
    model: BayesianNetwork, guide: AutoGuide, data: Any, mask: Mask, *, epoch: int, seed: int = 0, level: int = 0,
    weight_decay: float = 1e-4, ranks: Ranks = ALONE,
) -> None:  # fmt: skip
    """Set the scales of a guide that was trained as a point under ``mask``; other guides stay as they are.

    Call it under :func:`pyro_lottery.handlers.sparsify`, with the ``data`` and ``weight_decay`` of :func:`pyro_lottery.train`; ``epoch`` is the number of epochs that
    were trained.

    - ``laplace``: 1/scale² = (N/n)·Σ diag(JᵀΛJ)/T − ∂² log p/∂w² + N·λ/T, the curvature of what was minimised, with the sum over n of
      the N training examples (all, or ``EXAMPLES`` by ``seed``), T the KL temperature, p the prior and λ the weight decay.
    - ``swag``, ``sgld``, ``sghmc``: loc and scale are mean and standard deviation of the weights of the last steps. BatchNorm's statistics are
      those of the training data at the new loc.

    Several ``ranks`` take the mean of what each finds. Raises ``UserError`` if a scale would not be finite and positive.
    """
    if not isinstance(guide, Found):
        return
    data, device = training.as_data(model, guide, data), guide.loc.device
    mask = {name: m.to(device) for name, m in mask.items()}
    if isinstance(guide, Laplace):
        _laplace_(model, guide, data, mask, seed, level, weight_decay)
    elif isinstance(guide, Swag):
        _swag_(guide, mask)
        weights = masks.apply(mask, guides.posterior(guide)).loc
        update_batch_norm_(model, weights, data, training.TrainState(epoch), seed=seed, level=level)
    ranks.mean_([guide.loc.data, guide.log_scale.data, *(b for b in model.buffers() if b.is_floating_point())])


def check_findable(
    model: BayesianNetwork, guide: AutoGuide, data: Data, *, epochs: int, late: int, batch_size: int
) -> None:
    """Raise ``UserError`` before a training whose guide would not find its scales after it.

    ``late`` is the number of epochs that late rewinding leaves out.
    """
    if isinstance(guide, Laplace):
        split = in_memory(data.train)
        values = guides.posterior(guide).loc
        ggn_diagonal(model, values, {}, _batches(split, [torch.arange(min(2, len(split)), device=split.device)]))
        for name, precision in prior_precision(model, values).items():
            if not bool((precision > 0).all()):
                raise UserError(
                    f"laplace needs a prior with curvature, such as normal, but that of {name!r} has none; a weight that has no effect would have no "
                    "scale"
                )
    if isinstance(guide, Sgld) and late and 4 * late >= 3 * epochs:
        raise UserError(
            f"{type(guide).__name__.lower()} samples in the last quarter of {epochs} epochs with the moments of those before, and late rewinding leaves none; rewind to an earlier epoch"
        )
    if isinstance(guide, Swag):
        per_epoch = training.steps_in(data.train, batch_size)
        steps = epochs * per_epoch
        if min(snapshots(steps, steps), (epochs - late) * per_epoch) < 2:
            raise UserError(
                f"{type(guide).__name__.lower()} needs at least two steps in the last quarter of a training, which has {steps}; use more --epochs"
            )


def _laplace_(
    model: BayesianNetwork, guide: Laplace, data: Data, mask: Mask, seed: int, level: int, weight_decay: float
) -> None:
    posterior = guides.posterior(guide)
    values = masks.apply(mask, posterior).loc
    split = in_memory(data.train)
    generator = seeds.generator(split.device, seed, "curvature", level)
    taken = torch.randperm(len(split), generator=generator, device=split.device)[:EXAMPLES]
    curvature = ggn_diagonal(model, values, mask, _batches(split, taken.split(BATCH)))
    prior = prior_precision(model, values)
    times = len(split) / len(taken) / model.kl_temperature
    decay = len(split) * weight_decay / model.kl_temperature
    scale = {}
    for name, sums in curvature.items():
        precision = times * sums + prior[name] + decay
        kept = precision[mask[name]] if name in mask else precision
        if wrong := int((~((kept > 0) & kept.isfinite())).sum()):
            raise UserError(
                f"laplace finds a curvature that is not positive and finite at {wrong} weights of {name!r}; use a prior with curvature everywhere, "
                "such as normal, or a smaller --lr"
            )
        scale[name] = precision.rsqrt()
    guides.set_posterior_(guide, masks.apply(mask, replace(posterior, scale=scale)))


def _batches(split: Split, taken: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for indices in taken:
        yield split[indices], split.targets[indices]


def _swag_(guide: Swag, mask: Mask) -> None:
    if guide.taken < 2:
        raise UserError(
            f"{type(guide).__name__.lower()} has collected the weights of {guide.taken} steps and needs two, within the last quarter of a training; train it for more epochs"
        )
    mean, squares = guide.unpack(guide.mean.data), guide.unpack(guide.squares.data)
    scale = {name: (value / (guide.taken - 1)).sqrt().clamp(min=math.sqrt(1e-30)) for name, value in squares.items()}
    posterior = replace(guides.posterior(guide), loc=mean, scale=scale)
    guides.set_posterior_(guide, masks.apply(mask, posterior))
