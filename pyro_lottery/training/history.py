"""The history of a training: one row per epoch."""

from __future__ import annotations

from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import metrics
from pyro_lottery.data import Split, Stream, recorded
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.prediction import predict
from pyro_lottery.training.step import EXAMPLES, NLL, TALLY, TEMPERED_KL

History = list[dict[str, float]]
COLUMNS = ("epoch", "loss", "nll", "kl", "kl_weight", "train_accuracy", "lr", "seconds")
"""Columns of a classifier's history, without the accuracies of other splits."""


def measure_name(model: BayesianNetwork) -> str:
    """The measure of predictions in a history's columns: ``accuracy`` for classifiers, else ``rmse``."""
    return "accuracy" if model.task == "classification" else "rmse"


def columns(model: BayesianNetwork) -> tuple[str, ...]:
    """The columns of a history, without the measures of other splits."""
    return tuple(name.replace("accuracy", measure_name(model)) for name in COLUMNS)


def row_of(
    epoch: int, sums: Tensor, steps: int, model: BayesianNetwork, factor: float, rate: float, seconds: float
) -> dict[str, float]:
    """The row of an epoch of ``steps`` steps, from the sums of :func:`step` over it."""
    nll, kl = float(sums[NLL] / sums[EXAMPLES]), float(sums[TEMPERED_KL]) / steps / model.kl_temperature
    weight = factor * model.kl_temperature / model.num_data
    values = (epoch + 1, nll + weight * kl, nll, kl, weight, measured(model, sums), rate, seconds)
    return dict(zip(columns(model), values, strict=True))


def measured(model: BayesianNetwork, sums: Tensor) -> float:
    """The training accuracy or RMSE, from the sums of :func:`step`."""
    found = float(sums[TALLY] / sums[EXAMPLES])
    return found if model.task == "classification" else found**0.5


def measure_of(model: BayesianNetwork, guide: AutoGuide, split: Split | Stream, samples: int, precision: str) -> float:
    """The accuracy or RMSE of predictions on ``split``."""
    given = recorded(split)
    found = predict(model, guide, given, samples, precision=precision)
    return (metrics.accuracy if model.task == "classification" else metrics.rmse)(found, given.targets)
