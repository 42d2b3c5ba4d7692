"""Iterative magnitude pruning, Bayesian or deterministic: ``python -m pyro_lottery.imp --arch resnet18`` (paper §5).

This file has the loop over levels: train a ticket, score its posterior, shrink the mask, rewind. ``levels.py`` trains one
level, and a session (``runs/session.py``) keeps everything on disk.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from pyro_lottery import guides, masks, schedules, scores, seeds, tickets
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import sparsify
from pyro_lottery.handlers.used_weights import transformed
from pyro_lottery.model.mask_check import check_used_weights, warn_of_last_layer
from pyro_lottery.runs.cli import parse, run_command
from pyro_lottery.runs.config import EVIDENCE, MOVING, Config
from pyro_lottery.runs.loaded import Run
from pyro_lottery.runs.own import Own
from pyro_lottery.runs.progress import show_results
from pyro_lottery.runs.session import Session
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Posterior, Sites, Ticket

PROG = "python -m pyro_lottery.imp"


def run_imp(config: Config, own: Own | None = None) -> Run:
    """Run iterative magnitude pruning in ``config.run_dir``, or resume it, and return the finished run.

    ``own`` objects replace those that ``config`` names. Raises ``UserError``, ``Busy`` and ``Stopped`` as
    :meth:`Session.open`, and ``Diverged`` if a loss is not finite.
    """
    with Session.open(config, own) as session:
        schedule = _schedule_of(session)
        if schedule is not None:
            _check_schedule(session, schedule)
        elif config.levels:
            _check_pruning(session)
        remaining = -1
        for level in range(config.levels + 1):
            ticket = next_ticket(session, level)
            if config.prune_fraction == EVIDENCE and masks.remaining(ticket.mask) == remaining:
                break  # the score says that all weights that are left are worth something
            session.train(level, ticket, schedule if level == 0 else None)
            remaining = masks.remaining(ticket.mask)
    return session.load()


def next_ticket(session: Session, level: int) -> Ticket:
    """The ticket of ``level`` (paper §5).

    Level 0 is dense, at the initial values, or has a random mask over them with ``--schedule dynamic``. A later level has the mask of the
    level before, shrunk by the score of that level's posterior or as its schedule left it, and the values of the rewind point.
    """
    config = session.config
    if level == 0:
        return _random_ticket(session) if config.schedule == "dynamic" else session.dense
    posterior, net = session.posterior(level - 1)
    if config.schedule in MOVING:
        mask = session.mask(level - 1)
    else:
        mask = next_mask(session, level, session.ticket(level - 1).mask, posterior)
    if config.rewind != "lr":
        posterior, net = session.rewind_point()
    return tickets.rewind(mask, posterior, net)


def _random_ticket(session: Session) -> Ticket:
    """A random mask over the dense network, whose values are kept for rewinding and for controls."""
    config, dense = session.config, session.dense
    shapes = {name: mask.shape for name, mask in dense.mask.items()}
    assert config.prune_to is not None
    mask = schedules.erdos_renyi(shapes, config.prune_to, config.seed)
    masks.warn_of_empty(mask, dense.mask)
    return replace(dense, mask=mask)


def _schedule_of(session: Session) -> schedules.Schedule | None:
    """The schedule of level 0, or None if its mask stays."""
    config = session.config
    if config.schedule not in MOVING:
        return None
    score = _random_at if config.score == "random" else _score_of(session, 0)
    assert config.prune_to is not None
    return schedules.Gradual(config.prune_to, score) if config.schedule == "gradual" else schedules.Dynamic(score)


def _random_at(posterior: Posterior, context: scores.Context) -> Sites:
    """New noise at every move."""
    return scores.random(posterior, seeds.derive(context.seed, "score", context.level, context.step))


def next_mask(session: Session, level: int, mask: Mask, posterior: Posterior) -> Mask:
    """``mask``, shrunk by the score of ``posterior`` for the ticket of ``level``."""
    fraction = session.config.prune_fraction
    found, threshold = _scores_for(session, level, mask, posterior)
    if isinstance(fraction, float):
        return masks.shrink(mask, found, fraction)
    return masks.shrink_below(mask, found, threshold)


def _scores_for(session: Session, level: int, mask: Mask, posterior: Posterior) -> tuple[Sites, float]:
    """The scores of the survivors of ``mask`` for the ticket of ``level``, and the score below which weights go with ``--prune-fraction evidence``, otherwise -inf."""
    setup, config, score = session.setup, session.config, _score_of(session, level)
    threshold = scores.threshold_of(score) if config.prune_fraction == EVIDENCE else -math.inf
    if threshold is None:
        raise UserError(
            f"--prune-fraction {EVIDENCE} needs a score that says which weights are worth nothing: "
            f"{', '.join(scores.WITH_THRESHOLD)}, or one of yours with an attribute threshold"
        )
    decay = guides.decay_of_prior(setup.guide, config.weight_decay)
    # Otherwise a score that draws random numbers would give a resumed run other tickets than it has.
    with TURN, seeds.rng("cpu", config.seed, "score", level):
        context = scores.Context(
            setup.model, setup.data.train, mask, session.dense, config.seed, level, weight_decay=decay
        )
        return scores.ranks(score, posterior, context), threshold


def _score_of(session: Session, level: int) -> scores.Score:
    own = session.setup.own
    if own is None or own.score is None:
        return scores.by_name(session.config.score, session.config.seed, level)
    return own.score


def _check_pruning(session: Session) -> None:
    """Prune once before anything is trained or written, so that errors do not appear only after hours of training.

    Raises ``UserError`` if the score does not suit the guide, the guide cannot be pruned, or a level would have no weights.
    """
    config, fraction = session.config, session.config.prune_fraction
    count = masks.total(session.dense.mask)
    if count and isinstance(fraction, float) and config.levels > (possible := masks.times(count, fraction)):
        raise UserError(
            f"--levels {config.levels} would prune every weight: --prune-fraction {fraction:g} leaves some of "
            f"{count:,} prunable weights {possible} times; use at most --levels {possible}"
        )
    full = session.dense.mask
    found, _ = _scores_for(session, 1, full, session.dense.start)
    with warnings.catch_warnings(action="ignore"):  # the untrained network's scores may empty whole layers
        # What they say of a threshold is not what those of a trained network will say.
        half = max(1, masks.total(full) // 2)
        mask = (
            masks.shrink(full, found, fraction) if isinstance(fraction, float) else masks.shrink_to(full, found, half)
        )
    _check_used(session, mask)


def _check_used(session: Session, mask: Mask) -> None:
    """Raise ``UserError`` if the guide or a layer does not prune what ``mask`` prunes; warn if the final layer is pruned."""
    setup = session.setup
    x = setup.data.train.head()[0]
    with torch.no_grad(), sparsify(mask):
        setup.guide()
        check_used_weights(setup.model, x)
    warn_of_last_layer(setup.model, x)


def _check_schedule(session: Session, schedule: schedules.Schedule) -> None:
    """Move the mask once before anything is trained or written.

    Raises ``UserError`` if the score does not suit the guide, the guide cannot be pruned, or no move would be left for the end.
    """
    config, setup, ticket = session.config, session.setup, next_ticket(session, 0)
    if not masks.total(ticket.mask):
        raise UserError(masks.NOTHING_PRUNABLE)
    schedules.check_guide(setup.guide)
    if config.schedule == "dynamic" and (sites := transformed(setup.model.net)):
        raise UserError(
            f"--schedule dynamic needs the gradient of pruned weights, but the layer of {sites[0]!r} transforms its weights, so that the loss does not "
            "depend on a pruned one as it will when the weight is there; use --schedule gradual"
        )
    schedules.steps_between_moves(config.mask_every, setup.data, config.epochs, config.batch_size)
    start = masks.apply(ticket.mask, ticket.start)
    decay = guides.decay_of_prior(setup.guide, config.weight_decay)
    context = scores.Context(
        setup.model, setup.data.train, ticket.mask, session.dense, config.seed, 0, weight_decay=decay
    )
    with warnings.catch_warnings(action="ignore"), TURN, seeds.rng("cpu", config.seed, "move", 0):
        end = 1.0 if config.schedule == "gradual" else 0.0  # where it prunes or exchanges most
        mask = schedule.move(schedules.Move(ticket.mask, start, context, ticket.net, end))
    _check_used(session, mask)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def work() -> None:
        show_results(run_imp(parse(PROG, "Find lottery tickets by iterative magnitude pruning.", arguments)).folder)

    return run_command(PROG, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
