"""Iterative magnitude pruning, Bayesian or deterministic: ``python -m pyro_lottery.imp --arch resnet18`` (paper §5).

This is the one file that knows the order: train a level's ticket, score the posterior, shrink the mask, rewind, and so
on. What happens within a level is in levels.py.
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from rich.console import Console

from pyro_lottery import figures, guides, masks, scores, tickets, training
from pyro_lottery.config import Config, parse
from pyro_lottery.console import results_table
from pyro_lottery.errors import Damaged, Diverged, Stopped, UserError
from pyro_lottery.levels import LevelHooks, train_level
from pyro_lottery.model import BayesianClassifier
from pyro_lottery.prediction import has_bf16, resolve_precision
from pyro_lottery.results import RunFolder
from pyro_lottery.runs import Run, build, check_names, facts, load_data, load_run, resolve_device, shape_of
from pyro_lottery.types import Ticket


def run_imp(config: Config) -> Run:
    """Run iterative magnitude pruning to the end, or go on with it, in ``config.run_dir``; returns the run."""
    check_names(config)
    device = resolve_device(config.device)
    config = replace(config, precision=resolve_precision(config.precision, device))
    _warn_of_slow_bf16(config, device)
    with _signals() as received:
        data = load_data(config, device)
        shape = shape_of(data)
        model, guide = build(config, shape, device)
        training.check_batches(model, data, config.batch_size)
        if config.levels:  # a score that does not suit the guide shall fail now, not after the first level's hours
            initial = guides.posterior(guide)
            masks.shrink(masks.full(initial), scores.by_name(config.score)(initial), config.prune_fraction)
        run = RunFolder(str(config.run_dir))
        with run.lock():
            run.open(config.options(), facts(config, shape, device))
            finished = run.results()
            for level in range(finished[-1].level + 1 if finished else 0, config.levels + 1):
                if received:
                    raise Stopped
                ticket = next_ticket(run, level, config, model, guide)
                hooks = LevelHooks(run, level, config, model, guide, masks.density(ticket.mask), received)
                run.add_result(train_level(run.level(level), level, ticket, config, data, model, guide, hooks))
                run.level(level).drop_checkpoints()
                figures.draw_run(run)
            if finished:  # a kill may have come before the last level's pictures
                figures.draw_run(run)
    return load_run(run.path)


def next_ticket(run: RunFolder, level: int, config: Config, model: BayesianClassifier, guide: AutoGuide) -> Ticket:
    """The ticket of ``level``: dense at the initial values for level 0; later the mask of the level before, shrunk by
    its posterior's score, times the rewind point (paper §5). Read from files, so that a resumed run sees the same bits.
    """
    if level == 0:
        start = guides.posterior(guide)
        return tickets.rewind(masks.full(start), start, model.net_state())
    before = run.level(level - 1)
    trained = before.load_posterior()
    score = scores.by_name(config.score, config.seed, level)(trained[0])
    mask = masks.shrink(before.load_ticket().mask, score, config.prune_fraction)
    if config.rewind == "lr":
        start, net = trained
    elif config.rewind_epoch:
        start, net = run.rewind_point.load_posterior()
    else:
        first = run.level(0).load_ticket()
        start, net = first.start, first.net
    return tickets.rewind(mask, start, net)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that fills when SIGTERM or SIGINT asks to stop; a second SIGINT interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets the main thread alone handle signals
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn_of_slow_bf16(config: Config, device: torch.device) -> None:
    if config.precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        warnings.warn(
            "this processor has no bf16 instructions: --precision bf16 is emulated, about ten times slower than 32",
            stacklevel=2,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 finished, 2 bad input, 75 stopped with everything saved, 1 otherwise."""
    prog = "python -m pyro_lottery.imp"

    def complain(text: object) -> None:
        print(f"{prog}: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: complain(f"warning: {message}")
        try:
            run = run_imp(parse(prog, "Find lottery tickets by iterative magnitude pruning.", arguments))
        except UserError as error:
            complain(error)
            return 2
        except Stopped:
            complain("stopped, everything is saved; repeat the command to go on")
            return 75
        except (Diverged, Damaged, OSError) as error:  # anything else is not foreseen, and its traceback is needed
            complain(error)
            return 1
    Console().print(results_table(run.folder.results()))
    print(f"results, tickets, posteriors and figures: {run.folder.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
