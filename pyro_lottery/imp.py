"""Iterative magnitude pruning, Bayesian or deterministic: ``python -m pyro_lottery.imp --arch resnet18`` (paper §5).

This is the one file that knows the order: train a level's ticket, score the posterior, shrink the mask, rewind, and so
on. What happens within a level is in runs/session.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch

from pyro_lottery import guides, masks, scores, tickets
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import sparsify
from pyro_lottery.runs.build import Setup, prepare
from pyro_lottery.runs.cli import parse, run_command
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.loaded import Run, load_run
from pyro_lottery.runs.own import Own
from pyro_lottery.runs.progress import show_results
from pyro_lottery.runs.session import train_levels
from pyro_lottery.runs.signals import signals
from pyro_lottery.training.used_weights import check_used_weights
from pyro_lottery.types import Ticket

PROG = "python -m pyro_lottery.imp"


def run_imp(config: Config, own: Own | None = None) -> Run:
    """Run iterative magnitude pruning to the end, or go on with it, in ``config.run_dir``; returns the run. ``own`` objects
    take the place of those that ``config`` would name.
    """
    with signals() as received:
        setup = prepare(config, own)
        if config.levels:
            _try_out(setup)
        run = RunFolder(str(setup.config.run_dir))
        train_levels(run, setup, range(config.levels + 1), lambda level: next_ticket(run, level, setup), received)
    return load_run(run.path, trust_code=True, own=own)  # whoever gave the config


def next_ticket(run: RunFolder, level: int, setup: Setup) -> Ticket:
    """The ticket of ``level``: dense at the initial values for level 0; later the mask of the level before, shrunk by
    its posterior's score, times the rewind point (paper §5). Read from files, so that a resumed run sees the same bits.
    """
    config = setup.config
    if level == 0:
        return setup.dense
    before = run.level(level - 1)
    trained = before.load_posterior()
    score = _score(setup, level)(trained[0])
    mask = masks.shrink(before.load_ticket().mask, score, config.prune_fraction)
    return tickets.rewind(mask, *(trained if config.rewind == "lr" else run.load_rewind_point()))


def _score(setup: Setup, level: int) -> scores.Score:
    if setup.own is not None and setup.own.score is not None:
        return setup.own.score
    return scores.by_name(setup.config.score, setup.config.seed, level)


def _try_out(setup: Setup) -> None:
    """Prune once: a score that does not suit the guide, a guide that cannot be pruned, or a level that nothing would be
    left of shall fail before the first level's hours.
    """
    config, count = setup.config, masks.total(setup.dense.mask)
    if count and config.levels > (possible := masks.times(count, config.prune_fraction)):
        raise UserError(
            f"--levels {config.levels} would prune every weight: --prune-fraction {config.prune_fraction:g} leaves some of "
            f"{count:,} prunable weights {possible} times; use at most --levels {possible}"
        )
    initial = guides.posterior(setup.guide)
    score = _score(setup, 1)(initial)
    with warnings.catch_warnings(action="ignore"):  # of layers that the untrained network's scores empty
        mask = masks.shrink(masks.full(initial), score, config.prune_fraction)
    with torch.no_grad(), sparsify(mask):
        setup.guide()
        check_used_weights(setup.model, setup.data.train.head()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def work() -> None:
        show_results(run_imp(parse(PROG, "Find lottery tickets by iterative magnitude pruning.", arguments)).folder)

    return run_command(PROG, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
