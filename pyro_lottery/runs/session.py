"""Levels: train a ticket under its mask, measure it and save all of it; with checkpoints, display and signals.

Iterative pruning trains its levels here, and so do controls and transplants.
"""

from __future__ import annotations

import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from pyro_lottery import guides, masks, metrics, seeds, training
from pyro_lottery.data import recorded
from pyro_lottery.errors import Damaged, Diverged, Stopped
from pyro_lottery.handlers import sparsify
from pyro_lottery.prediction import predict, predictive
from pyro_lottery.runs import figures
from pyro_lottery.runs.build import Setup
from pyro_lottery.runs.checkpoint import LevelHooks, checksum, ticket_checksum
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import LevelFolder, RunFolder
from pyro_lottery.runs.signals import Received
from pyro_lottery.types import LevelResult, Ticket

DRAW_SECONDS = 10.0
"""Least time between two drawings of a run's figures, which cost more than a small network's training."""


def train_levels(
    run: RunFolder,
    setup: Setup,
    levels: Iterable[int],
    ticket_of: Callable[[int], Ticket],
    received: Received,
    **facts: str,
) -> None:
    """Open the run's folder, train the ticket of each of ``levels`` that is not finished, and draw the run's figures.

    ``facts`` go into config.json beside those of ``setup``. Of several ranks the first alone reads and writes the
    folder. Raises ``Busy`` while another process is at work there, and ``Stopped`` between two levels, or within one
    after saving it, when ``received`` holds a signal.
    """
    ranks, levels = setup.ranks, list(levels)

    def enter() -> set[int]:
        inside.enter_context(run.lock())
        run.open(setup.config.options(), setup.facts | facts, levels)
        return {row.level for row in run.results()}

    def unchanged(level: int) -> bool:
        """Whether a finished level was trained from the ticket that it would get now; else it is no longer finished."""
        if ticket_checksum(ticket_of(level)) == ticket_checksum(run.level(level).load_ticket()):
            return True
        warnings.warn(
            f"level {level} was trained from another ticket than it has now, and is trained again", stacklevel=2
        )
        run.drop_result(level)
        return False

    with received.heeded(), ExitStack() as inside:
        finished, drawn, anew = ranks.first(enter), time.monotonic(), False
        for level in levels:
            # Levels are trained again where their files were damaged; later ones hold, if their tickets come out the same.
            if level in finished and (not anew or ranks.first(lambda level=level: unchanged(level))):  # type: ignore[misc]
                continue
            if ranks.any(bool(received)):
                raise Stopped
            anew = True
            ticket = ranks.first(lambda level=level: ticket_of(level))  # type: ignore[misc]
            hooks = LevelHooks(run, level, setup, ticket, received)
            row = train_level(run.level(level), level, ticket, setup, hooks)

            def finish(row: LevelResult = row) -> None:
                nonlocal drawn
                run.add_result(row)
                run.level(row.level).drop_checkpoints()
                if time.monotonic() - drawn > DRAW_SECONDS:
                    figures.plot_run(run)
                    drawn = time.monotonic()

            ranks.first(finish)
        ranks.first(lambda: figures.plot_run(run))


def train_level(folder: LevelFolder, level: int, ticket: Ticket, setup: Setup, hooks: LevelHooks) -> LevelResult:
    """Train one ticket, measure it, and save all of it in ``folder``; returns its row of ``results.csv``."""
    config, data, model, guide = setup.config, setup.data, setup.model, setup.guide
    device, ranks = next(guide.parameters()).device, setup.ranks
    ranks.agree(f"the ticket of level {level}", lambda: ticket_checksum(ticket))
    ranks.first(lambda: folder.save_ticket(ticket))
    with sparsify(ticket.mask), seeds.deterministic(config.deterministic):
        try:
            history = _train(folder, level, ticket, setup, hooks)
        except Diverged as error:
            if config.on_divergence != "retry" or ranks.first(folder.load_divergence):
                raise
            ranks.first(folder.drop_checkpoints)
            what = {"epoch": error.epoch, "step": error.step, "sites": error.sites, "lr": config.lr / 2}
            ranks.first(lambda: folder.save_divergence(what))
            warnings.warn(f"{error}; level {level} begins anew with --lr {config.lr / 2:g}", stacklevel=2)
            history = _train(folder, level, ticket, setup, hooks)
        with hooks.measuring(), seeds.stream(device, config.seed, "predict", level):
            measured = _measure(setup)
    posterior, net = masks.apply(ticket.mask, guides.posterior(guide)), model.net_state()
    ranks.agree(f"what level {level} trained to", lambda: checksum(posterior, net))

    def save() -> None:
        folder.save_posterior(posterior, net)
        folder.save_history(history)

    ranks.first(save)
    seconds = [row["seconds"] for row in history]
    steps = training.steps_in(data.train, config.batch_size, ranks.least)
    return LevelResult(
        level=level,
        density=masks.density(ticket.mask),
        remaining=masks.remaining(ticket.mask),
        total=masks.total(ticket.mask),
        train_seconds=sum(seconds),
        step_ms=1000 * statistics.median(seconds) / steps,
        **_columns(measured, history),
    )


def _measure(setup: Setup) -> dict[str, float]:
    """What the trained network is worth on the test split, by name: metrics of class probabilities, or of a regression."""
    model, guide, config = setup.model, setup.guide, setup.config
    assert setup.data.test is not None  # as _prepare has seen
    test = recorded(setup.data.test)
    options: dict[str, Any] = {"num_samples": config.eval_samples, "precision": config.precision}
    if model.task == "classification":
        return metrics.all_metrics(predict(model, guide, test, **options), test.targets)
    return metrics.regression(predictive(model, guide, test, **options), test.targets)


def _columns(measured: dict[str, float], history: training.History) -> dict[str, Any]:
    """The columns of ``results.csv`` that say how good a level is; those of the other task are None."""
    accuracies = ("test_accuracy", "max_test_accuracy", "val_accuracy", "mace", "ece", "brier")
    columns: dict[str, Any] = dict.fromkeys(accuracies) | measured
    if "rmse" in measured:
        return columns | {"val_rmse": min((row["val_rmse"] for row in history if "val_rmse" in row), default=None)}
    columns["test_accuracy"] = columns.pop("accuracy")
    columns["max_test_accuracy"] = max(columns["test_accuracy"], *(row["test_accuracy"] for row in history))
    if "val_accuracy" in history[0]:
        chosen = max(history, key=lambda row: row["val_accuracy"])
        columns |= {"val_accuracy": chosen["val_accuracy"], "selected_test_accuracy": chosen["test_accuracy"]}
    return columns


def _train(folder: LevelFolder, level: int, ticket: Ticket, setup: Setup, hooks: LevelHooks) -> training.History:
    options, diverged = _train_options(setup.config), setup.ranks.first(folder.load_divergence)
    options["epochs"] = setup.config.epochs_of(level)
    state = training.TrainState(setup.config.first_epoch(level))  # Adam begins anew at every level
    if diverged:
        lr = diverged.get("lr")
        if lr != setup.config.lr / 2:
            raise Damaged(
                f"{folder.path / 'diverged.json'} gives the lr {lr}, not half of {setup.config.lr:g}; remove it"
            )
        options["lr"] = lr
    setup.model.start_from_(setup.guide, ticket)
    with hooks:
        return training.train(
            setup.model, setup.guide, setup.data, **options, level=level, state=state, hooks=hooks, ranks=setup.ranks
        )


def _train_options(config: Config) -> dict[str, Any]:
    taken = inspect.signature(training.train).parameters.values()
    return {p.name: getattr(config, p.name) for p in taken if p.kind is p.KEYWORD_ONLY and hasattr(config, p.name)}
