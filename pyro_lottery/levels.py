"""One level: train a ticket under its mask and measure the trained network (paper §5). This module uses no files."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from pyro.infer.autoguide import AutoGuide

from pyro_lottery import guides, masks, metrics, seeds, training
from pyro_lottery.data import Data, recorded
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.handlers import count_flops, sparse_layers, sparsify
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.prediction import logits_mean, predict, predictive
from pyro_lottery.types import LevelResult, Posterior, Sites, Ticket

WHOLE = "training steps as a whole"
"""Key of :attr:`TrainedLevel.layers` for whole steps, which were measured."""


@dataclass(frozen=True, eq=False)
class TrainedLevel:
    """The result of training one ticket."""

    posterior: Posterior
    """Marginal loc and scale of every site; 0 for pruned weights."""
    net: Sites
    """The network's values that are not random."""
    history: training.History
    """One row per epoch."""
    measured: dict[str, float]
    """Metrics on the test split, by name."""
    costs: dict[str, Any]
    """The columns ``predict_ms`` and ``flops`` of :class:`LevelResult`."""
    steps: int
    """Batches per epoch."""
    layers: dict[str, str]
    """How each pruned layer was computed, ``sparse`` or ``dense`` (:func:`pyro_lottery.handlers.sparse_layers`).

    ``training steps as a whole`` is there if whole steps were faster with all pruned layers sparse, or all dense.
    """


def train_level(
    model: BayesianNetwork,
    guide: AutoGuide,
    data: Data,
    ticket: Ticket,
    level: int,
    *,
    first_epoch: int,
    epochs: int,
    eval_samples: int,
    batch_size: int,
    precision: str,
    seed: int,
    hooks: training.Hooks,
    ranks: Ranks = ALONE,
    sparse: str = "auto",
    **options: Any,
) -> TrainedLevel:
    """Train ``model`` and ``guide`` from ``ticket`` under its mask, and measure them with ``eval_samples`` posterior samples.

    Training starts at ``first_epoch``, counted from 0, with ``epochs`` and the other ``options`` of :func:`pyro_lottery.train`.
    ``sparse`` is the choice of :func:`pyro_lottery.handlers.sparse_layers`; in training, ``auto`` means what
    :func:`pyro_lottery.training.sparse_for_data` returns. Metrics are those on the test split. Raises ``Diverged`` if the loss
    is not finite, and any exception of ``hooks``.
    """
    predicting = sparse_layers(sparse)
    if masks.is_full(ticket.mask):
        sparse, predicting = "off", sparse_layers("off")
    whole = training.sparse_for_data(
        sparse, ticket.mask, model, guide, data, epochs=epochs, batch_size=batch_size, precision=precision,
        estimator=options.get("estimator", "weights"), ranks=ranks,
    )  # fmt: skip
    layers = sparse_layers(whole)
    with sparsify(ticket.mask):
        model.start_from_(guide, ticket)
        state = training.TrainState(first_epoch)  # each level starts with new moments of Adam
        with layers:
            history = training.train(
                model, guide, data, epochs=epochs, batch_size=batch_size, precision=precision, seed=seed, level=level,
                state=state, hooks=hooks, ranks=ranks, **options,
            )  # fmt: skip
        device = next(guide.parameters()).device
        with predicting, hooks.measuring(), seeds.rng(device, seed, "predict", level):
            began = time.perf_counter()
            measured = measure(model, guide, data, eval_samples, precision)
            assert data.test is not None
            seconds = time.perf_counter() - began
            costs = {"predict_ms": 1000 * seconds / len(data.test), "flops": flops(model, guide, data)}
    posterior = masks.apply(ticket.mask, guides.posterior(guide))
    steps = training.steps_in(data.train, batch_size, ranks.least)
    ways = {} if whole == sparse else {WHOLE: "dense" if whole == "off" else "sparse"}
    return TrainedLevel(
        posterior, model.net_state(), history, measured, costs, steps, ways | layers.ways | predicting.ways
    )


def measure(
    model: BayesianNetwork, guide: AutoGuide, data: Data, num_samples: int, precision: str = "32"
) -> dict[str, float]:
    """Metrics on the test split, by name: those of class probabilities, or of a regression."""
    assert data.test is not None
    test = recorded(data.test)
    if model.task == "classification":
        return metrics.all_metrics(predict(model, guide, test, num_samples, precision=precision), test.targets)
    return metrics.regression(predictive(model, guide, test, num_samples, precision=precision), test.targets)


def flops(model: BayesianNetwork, guide: AutoGuide, data: Data) -> int:
    """Floating-point operations of one example's forward pass with the posterior's locs, where they are not 0."""
    with count_flops() as counted:
        outputs = logits_mean(model, guide, data.train.head()[0])
    return counted.total // len(outputs)


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
        **trained.costs,
        **_columns(trained.measured, trained.history),
    )


def _columns(measured: dict[str, float], history: training.History) -> dict[str, Any]:
    """The columns with the quality of a level; columns of the other task are left out."""
    columns: dict[str, Any] = dict(measured)
    if "rmse" in measured:
        return columns | {"val_rmse": min((row["val_rmse"] for row in history if "val_rmse" in row), default=None)}
    columns["test_accuracy"] = columns.pop("accuracy")
    columns["max_test_accuracy"] = max(columns["test_accuracy"], *(row["test_accuracy"] for row in history))
    if "val_accuracy" in history[0]:
        chosen = max(history, key=lambda row: row["val_accuracy"])
        columns |= {"val_accuracy": chosen["val_accuracy"], "selected_test_accuracy": chosen["test_accuracy"]}
    return columns
