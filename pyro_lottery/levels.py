"""One level: train a ticket under its mask and measure what came of it (paper §5). Nothing here knows of files."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from pyro.infer.autoguide import AutoGuide

from pyro_lottery import guides, masks, metrics, seeds, training
from pyro_lottery.data import Data, recorded
from pyro_lottery.distributed import ALONE, Alone
from pyro_lottery.handlers import sparsify
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.prediction import predict, predictive
from pyro_lottery.types import LevelResult, Posterior, Sites, Ticket


@dataclass(frozen=True, eq=False)
class TrainedLevel:
    """What a ticket trained to."""

    posterior: Posterior
    """Marginal loc and scale of every site; those of pruned weights are 0."""
    net: Sites
    """The part of the network that is not random."""
    history: training.History
    """One row per epoch."""
    measured: dict[str, float]
    """Metrics of the test split by name."""
    steps: int
    """Batches in an epoch."""


def train_level(
    model: BayesianNetwork,
    guide: AutoGuide,
    data: Data,
    ticket: Ticket,
    level: int,
    *,
    first_epoch: int,
    eval_samples: int,
    hooks: training.Hooks,
    ranks: Alone = ALONE,
    **options: Any,
) -> TrainedLevel:
    """Start ``model`` and ``guide`` from ``ticket``, train them under its mask from ``first_epoch`` on, and measure them on the
    test split by ``eval_samples`` posterior samples.

    ``options`` are those of :func:`pyro_lottery.train`. Raises ``Diverged`` where the loss is no longer finite, and
    whatever ``hooks`` raise.
    """
    with sparsify(ticket.mask):
        model.start_from_(guide, ticket)
        state = training.TrainState(first_epoch)  # Adam begins anew at every level
        history = training.train(model, guide, data, **options, level=level, state=state, hooks=hooks, ranks=ranks)
        device = next(guide.parameters()).device
        with hooks.measuring(), seeds.stream(device, options["seed"], "predict", level):
            measured = measure(model, guide, data, eval_samples, options["precision"])
    posterior = masks.apply(ticket.mask, guides.posterior(guide))
    steps = training.steps_in(data.train, options["batch_size"], ranks.least)
    return TrainedLevel(posterior, model.net_state(), history, measured, steps)


def measure(
    model: BayesianNetwork, guide: AutoGuide, data: Data, num_samples: int, precision: str = "32"
) -> dict[str, float]:
    """Metrics of the test split by name: of class probabilities, or of a regression."""
    assert data.test is not None
    test = recorded(data.test)
    if model.task == "classification":
        return metrics.all_metrics(predict(model, guide, test, num_samples, precision=precision), test.targets)
    return metrics.regression(predictive(model, guide, test, num_samples, precision=precision), test.targets)


def result(level: int, ticket: Ticket, trained: TrainedLevel) -> LevelResult:
    """The level's row of ``results.csv``."""
    seconds = [row["seconds"] for row in trained.history]
    return LevelResult(
        level=level,
        density=masks.density(ticket.mask),
        remaining=masks.remaining(ticket.mask),
        total=masks.total(ticket.mask),
        train_seconds=sum(seconds),
        step_ms=1000 * statistics.median(seconds) / trained.steps,
        **_columns(trained.measured, trained.history),
    )


def _columns(measured: dict[str, float], history: training.History) -> dict[str, Any]:
    """The columns that say how good a level is; columns of the other task are None."""
    of_classes = ("test_accuracy", "max_test_accuracy", "val_accuracy", "mace", "ece", "brier")
    columns: dict[str, Any] = dict.fromkeys(of_classes) | measured
    if "rmse" in measured:
        return columns | {"val_rmse": min((row["val_rmse"] for row in history if "val_rmse" in row), default=None)}
    columns["test_accuracy"] = columns.pop("accuracy")
    columns["max_test_accuracy"] = max(columns["test_accuracy"], *(row["test_accuracy"] for row in history))
    if "val_accuracy" in history[0]:
        chosen = max(history, key=lambda row: row["val_accuracy"])
        columns |= {"val_accuracy": chosen["val_accuracy"], "selected_test_accuracy": chosen["test_accuracy"]}
    return columns
