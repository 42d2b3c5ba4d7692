"""One level: train a ticket under its mask and measure the trained network (paper §5). This module uses no files."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro.infer.autoguide import AutoGuide

from pyro_lottery import guides, masks, metrics, posteriors, schedules, seeds, training
from pyro_lottery.data import Data, recorded
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.handlers import count_flops, sparse_layers, sparsify
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.prediction import logits_mean, predict, predictive
from pyro_lottery.types import LevelResult, Mask, Posterior, Sites, Ticket

WHOLE = "training steps as a whole"
"""Key of :attr:`TrainedLevel.layers` for whole steps, which were measured."""


@dataclass(frozen=True, eq=False)
class TrainedLevel:
    """The result of training one ticket."""

    mask: Mask
    """The mask of the trained network: the ticket's, unless a schedule moved it."""
    posterior: Posterior
    """Marginal loc and scale of every site; 0 for pruned weights."""
    net: Sites
    """The network's values that are not random."""
    history: training.History
    """One row per epoch."""
    settled: training.History
    """The rows of ``history`` that are of this posterior's kind and mask: those after the last move of a schedule, and none if the posterior was
    found after the training of a point."""
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
    schedule: schedules.Schedule | None = None,
    mask_every: int | None = None,
    dense: Ticket | None = None,
    weight_decay: float = 1e-4,
    **options: Any,
) -> TrainedLevel:
    """Train ``model`` and ``guide`` from ``ticket`` under its mask, and measure them with ``eval_samples`` posterior samples.

    Training starts at ``first_epoch``, counted from 0, with ``epochs`` and the other ``options`` of :func:`pyro_lottery.train`.
    ``sparse`` is the choice of :func:`pyro_lottery.handlers.sparse_layers`; in training, ``auto`` means what
    :func:`pyro_lottery.training.sparse_for_data` returns. A ``schedule`` moves the mask every ``mask_every`` steps
    (:func:`pyro_lottery.schedules.train`), and ``dense`` then holds the values at the start of level 0. Metrics are those on the test
    split. Raises ``Diverged`` if the loss is not finite, and any exception of ``hooks``.
    """
    model.start_from_(guide, ticket)
    state = training.TrainState(first_epoch)  # each level starts with new moments of Adam
    of_all: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "precision": precision, "seed": seed, "level": level, "state": state,
        "hooks": hooks, "ranks": ranks, "weight_decay": weight_decay, **options,
    }  # fmt: skip
    if schedule is not None:
        assert dense is not None
        mask, ways = schedules.train(
            schedule, mask_every, model, guide, data, ticket.mask, dense=dense, sparse=sparse, **of_all
        )
    else:
        mask, ways = ticket.mask, _train_under(ticket.mask, model, guide, data, sparse, of_all)
    predicting = sparse_layers("off" if masks.is_full(mask) else sparse)
    device = next(guide.parameters()).device
    with sparsify(mask), hooks.measuring():
        posteriors.find_scales_(
            model, guide, data, mask, epoch=first_epoch + epochs, seed=seed, level=level,
            weight_decay=weight_decay, ranks=ranks,
        )  # fmt: skip
        with predicting, seeds.rng(device, seed, "predict", level):
            measured, seconds = measure(model, guide, data, eval_samples, precision)
            assert data.test is not None
            costs = {"predict_ms": 1000 * seconds / len(data.test), "flops": flops(model, guide, data)}
    posterior = masks.apply(mask, guides.posterior(guide))
    steps = training.steps_in(data.train, batch_size, ranks.least)
    return TrainedLevel(
        mask,
        posterior,
        model.net_state(),
        state.history,
        [row for row in state.history if row["epoch"] * steps >= state.moved]
        if guides.scales_are_trained(guide)
        else [],
        measured,
        costs,
        steps,
        ways | predicting.ways,
    )


def _train_under(
    mask: Mask, model: BayesianNetwork, guide: AutoGuide, data: Data, sparse: str, options: Mapping[str, Any]
) -> dict[str, str]:
    """Train under one mask; returns how its layers were computed."""
    sparse = "off" if masks.is_full(mask) else sparse
    names = ("epochs", "batch_size", "precision", "ranks")
    with guides.training_point(guide):
        whole = training.sparse_for_data(
            sparse,
            mask,
            model,
            guide,
            data,
            estimator=options.get("estimator", "weights"),
            **{n: options[n] for n in names},
        )
    layers = sparse_layers(whole)
    with sparsify(mask), layers:
        training.train(model, guide, data, **options)
    return ({} if whole == sparse else {WHOLE: "dense" if whole == "off" else "sparse"}) | layers.ways


def measure(
    model: BayesianNetwork, guide: AutoGuide, data: Data, num_samples: int, precision: str = "32"
) -> tuple[dict[str, float], float]:
    """Metrics on the test split, by name: those of class probabilities, or of a regression; and the seconds of the prediction alone."""
    assert data.test is not None
    test, began = recorded(data.test), time.perf_counter()
    if model.task == "classification":
        probs = predict(model, guide, test, num_samples, precision=precision).cpu()  # which waits for a GPU
        seconds = time.perf_counter() - began
        return metrics.all_metrics(probs, test.targets), seconds
    found: Any = predictive(model, guide, test, num_samples, precision=precision)
    found.mean.cpu()
    seconds = time.perf_counter() - began
    return metrics.regression(found, test.targets), seconds


def flops(model: BayesianNetwork, guide: AutoGuide, data: Data) -> int:
    """Floating-point operations of one example's forward pass with the posterior's locs, where they are not 0."""
    with count_flops() as counted:
        outputs = logits_mean(model, guide, data.train.head()[0])
    return counted.total // len(outputs)


def result(level: int, trained: TrainedLevel) -> LevelResult:
    """The level's row of ``results.csv``."""
    seconds = [row["seconds"] for row in trained.history]
    return LevelResult(
        level=level,
        density=masks.density(trained.mask),
        remaining=masks.remaining(trained.mask),
        total=masks.total(trained.mask),
        train_seconds=sum(seconds),
        step_ms=1000 * statistics.median(seconds) / trained.steps,
        **trained.costs,
        **_columns(trained.measured, trained.settled),
    )


def _columns(measured: dict[str, float], history: training.History) -> dict[str, Any]:
    """The columns with the quality of a level; columns of the other task are left out. ``history`` is empty if it is not of the posterior."""
    columns: dict[str, Any] = dict(measured)
    if "rmse" in measured:
        if math.isnan(measured["rmse"]):  # the likelihood has no mean
            return columns | {"rmse": None}
        return columns | {"val_rmse": min((row["val_rmse"] for row in history if "val_rmse" in row), default=None)}
    columns["test_accuracy"] = columns.pop("accuracy")
    columns["max_test_accuracy"] = max([columns["test_accuracy"], *(row["test_accuracy"] for row in history)])
    if history and "val_accuracy" in history[0]:
        chosen = max(history, key=lambda row: row["val_accuracy"])
        columns |= {"val_accuracy": chosen["val_accuracy"], "selected_test_accuracy": chosen["test_accuracy"]}
    return columns
