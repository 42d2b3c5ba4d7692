"""Training under a mask that moves between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import guides, masks, seeds, training
from pyro_lottery.data import Data, Split
from pyro_lottery.errors import UserError
from pyro_lottery.guides.family import family
from pyro_lottery.handlers import sparse_layers, sparsify
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.scores import Context
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Posterior, Sites, Ticket

LAST_MOVE = 0.75
"""The fraction of a training after which masks stay, so that the weights that are there can settle."""


@dataclass(frozen=True, eq=False)
class Move:
    """What a schedule sees when a mask is to move, on the CPU."""

    mask: Mask
    posterior: Posterior
    """Marginal loc and scale of every site; 0 for pruned weights."""
    context: Context
    """What scores see; its batches follow the step."""
    net: Sites
    """The network's values that are not random, as they are now."""
    progress: float
    """Finished steps over all steps of the training, divided by ``LAST_MOVE``; at most 1."""

    def loss(self, values: Sites, examples: tuple[Any, Tensor]) -> Tensor:
        """The mean negative log-likelihood, a scalar, of a batch of ``examples`` with ``values`` as weights, by site and of the sites' shapes."""
        now = replace(self.context, dense=Ticket(self.mask, self.posterior, self.net))
        return now.loss(values, examples)


class Schedule(Protocol):
    """How a mask moves."""

    def move(self, at: Move) -> Mask:
        """The mask of the next steps, a bool tensor per site, of the site's shape."""


def steps_between_moves(every: int | None, data: Data, epochs: int, batch_size: int) -> int:
    """``every``, by default 100 steps, or a tenth of a training if that is less; for a loader, rounded up to whole epochs.

    Raises ``UserError`` if no move falls between ``LAST_MOVE`` of the training and its end, since a schedule would not be completed.
    """
    per_epoch = training.steps_in(data.train, batch_size)
    steps, unit = epochs * per_epoch, 1 if isinstance(data.train, Split) else per_epoch
    every = max(1, min(100, steps // 10)) if every is None else every
    every = math.ceil(every / unit) * unit
    last = (steps - 1) // every * every
    if last < LAST_MOVE * steps:
        raise UserError(
            f"--mask-every {every} changes the mask last after {last} of {steps} steps; a schedule needs a change in the last quarter of a "
            "training: choose a smaller --mask-every, or more --epochs, of which a loader needs five"
        )
    return every


def train(
    schedule: Schedule,
    every: int | None,
    model: BayesianNetwork,
    guide: AutoGuide,
    data: Data,
    mask: Mask,
    *,
    dense: Ticket,
    epochs: int,
    batch_size: int,
    seed: int,
    level: int,
    state: training.TrainState,
    hooks: training.Hooks,
    sparse: str = "off",
    **options: Any,
) -> tuple[Mask, dict[str, str]]:
    """Train ``model`` and ``guide`` as :func:`pyro_lottery.train` does, under ``mask``, and let ``schedule`` move it.

    It moves every ``every`` steps (:func:`steps_between_moves`) until ``LAST_MOVE`` of the training is over. A weight that comes has loc 0, the mean scale of its site's survivors, and in this package's guides moments 0 of Adam; all
    others keep what they have.
    ``dense`` holds the values at the start of level 0, for scores. ``sparse`` and ``options`` are those of
    :func:`pyro_lottery.levels.train_level`. Returns the last mask, and how its layers were computed.

    All follows from ``seed``, ``level`` and the step, of those until the end of this call; ``state`` keeps the mask, so that a training that
    was left goes on with the same bits. The seconds in the history are those of steps and moves, without what is checked anew after a move. Raises as
    :func:`pyro_lottery.train`, :func:`steps_between_moves` and :func:`check_guide` do.
    """
    end, per_epoch = state.epoch + epochs, training.steps_in(data.train, batch_size)
    steps, between = end * per_epoch, steps_between_moves(every, data, end, batch_size)
    check_guide(guide)

    def is_due() -> bool:
        done = state.epoch * per_epoch + state.step
        return done - state.moved >= between and done < steps and state.moved < LAST_MOVE * steps

    pausing = _Pausing(hooks, is_due)
    mask = hooks.begin(state.mask or mask)
    if state.mask is None:
        state.moved = state.epoch * per_epoch
    layers = sparse_layers("off")
    while state.epoch < end:
        layers = sparse_layers("off" if masks.is_full(mask) else sparse)
        try:
            with sparsify(mask), layers:
                training.train(
                    model, guide, data, epochs=end - state.epoch, batch_size=batch_size, seed=seed, level=level, state=state,
                    hooks=pausing, **options,
                )  # fmt: skip
        except _Pause:
            began, done = time.perf_counter(), state.epoch * per_epoch + state.step
            progress = min(1.0, done / (LAST_MOVE * steps))
            decay = guides.decay_of_prior(guide, options.get("weight_decay", 1e-4))
            mask = _moved(schedule, model, guide, data, mask, dense, seed, level, done, progress, state, decay)
            state.seconds += time.perf_counter() - began
    return mask, layers.ways


def check_guide(guide: AutoGuide) -> None:
    """Raise ``UserError`` if the mask of ``guide`` cannot move, since loc and scale are not all there is to know of it."""
    own = family(guide)
    if not own.scales_are_trained:
        raise UserError(
            f"a mask cannot move while a {type(guide).__name__} guide trains, whose scales are known only after the training; use mean_field "
            "or deterministic"
        )
    if not (own.has_marginals and own.is_determined):
        raise UserError(
            f"a mask cannot move while a {type(guide).__name__} trains, since loc and scale do not determine it; use mean_field or "
            "deterministic"
        )


def _moved(
    schedule: Schedule, model: BayesianNetwork, guide: AutoGuide, data: Data, mask: Mask, dense: Ticket, seed: int, level: int,
    done: int, progress: float, state: training.TrainState, decay: float,
) -> Mask:  # fmt: skip
    """Move the mask, and with it the guide's parameters and the moments in ``state``."""
    posterior = masks.apply(mask, _on_cpu(guides.posterior(guide)))
    net = {name: value.cpu() for name, value in model.net_state().items()}
    mask = {name: m.cpu() for name, m in mask.items()}
    with TURN, seeds.rng("cpu", seed, "move", level, done):
        context = Context(model, data.train, mask, dense, seed, level, done, decay)
        moved = schedule.move(Move(mask, posterior, context, net, progress))
    new = {name: m & ~mask[name] for name, m in moved.items()}
    guides.set_posterior_at_(guide, new, grown(posterior, mask, moved))
    state.moments = guides.moved_moments(model, guide, state.moments, mask, moved)
    state.mask, state.moved, state.belongs = moved, done, None
    return moved


def grown(posterior: Posterior, before: Mask, after: Mask) -> Posterior:
    """``posterior``, pruned by ``after``, in which weights that ``before`` had pruned have loc 0 and their site's mean scale.

    The mean is over the survivors of both masks, or over all scales of the posterior that are not 0 where a site has none. All
    tensors have their sites' shapes.
    """
    kept = masks.apply(after, posterior)
    if posterior.scale is None or kept.scale is None:
        return kept
    scale = dict(kept.scale)
    usual = torch.cat([s[s > 0] for s in posterior.scale.values()]).mean()
    for name, mask in after.items():
        new, stay = mask & ~before[name], mask & before[name]
        if bool(new.any()):
            mean = posterior.scale[name][stay].mean() if bool(stay.any()) else usual
            scale[name] = torch.where(new, mean, scale[name])
    return replace(kept, scale=scale)


def _on_cpu(posterior: Posterior) -> Posterior:
    loc = {name: value.cpu() for name, value in posterior.loc.items()}
    scale = None if posterior.scale is None else {name: value.cpu() for name, value in posterior.scale.items()}
    return replace(posterior, loc=loc, scale=scale)


class _Pause(Exception):
    """Leaves a training between two steps."""


class _Pausing(training.Hooks):
    """The hooks of a training that is left whenever a move is due."""

    def __init__(self, inner: training.Hooks, is_due: Callable[[], bool]):
        self.inner, self.is_due, self._is_begun = inner, is_due, False

    def start(self, state: training.TrainState) -> None:
        if not self._is_begun:
            self.inner.start(state)
        self._is_begun = True
        if self.is_due():  # a training that was stopped where a move was due
            raise _Pause

    def stopping(self) -> bool:
        return self.inner.stopping() or self.is_due()

    def stop(self, state: training.TrainState) -> None:
        if self.inner.stopping():
            self.inner.stop(state)
        raise _Pause

    def progress(self, state: training.TrainState, steps: int, nll: float, measured: float) -> None:
        self.inner.progress(state, steps, nll, measured)

    def measuring(self) -> AbstractContextManager[None]:
        return self.inner.measuring()

    def epoch_ended(self, state: training.TrainState) -> None:
        self.inner.epoch_ended(state)
        if self.is_due():
            raise _Pause
