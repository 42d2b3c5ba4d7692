"""Variance of each estimator's gradient at the trained dense network of a run, on one batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import pyro_lottery as pl
from experiments.benchmarks.candidates import OURS, has_compiled
from experiments.benchmarks.timing import wait
from pyro_lottery import guides, kernels
from pyro_lottery.errors import UserError
from pyro_lottery.machine import autocast, channels_last
from pyro_lottery.training import precision_for_batch


def variance_rows(path: str, batch: int, draws: int, precision: str, device: torch.device) -> list[dict[str, Any]]:
    """Trace of the covariance of the gradient of all locs and of all log-scales, one row per estimator.

    Raises ``UserError`` for a run whose guide is not mean_field.
    """
    run = pl.load_run(path)
    trained = run.level(0).load_model(device)
    model, guide, data = trained.model, trained.guide, run.load_data(device)
    if not isinstance(guide, guides.MeanField):
        raise UserError(f"--run {path} has a {type(guide).__name__} guide; the variance is measured on mean_field")
    x, y = channels_last(data.train[:batch]), data.train.labels[:batch]
    precision = precision_for_batch(precision, model, x)
    model.train()
    rows: list[dict[str, Any]] = []
    for name, (estimator, samples, kernel_path, density) in OURS.items():
        if estimator == "point" or density < 1 or kernel_path == ("torch" if has_compiled(device) else "compiled"):
            continue
        elbo = pl.ELBO(estimator=estimator)

        def backward(elbo: pl.ELBO = elbo, samples: int = samples, kernel_path: str = kernel_path) -> None:
            for sample in range(samples):
                with kernels.using(kernel_path), autocast(device, precision):
                    terms = elbo.terms(model, guide, x, y, closed_forms=0 if sample else samples)
                ((terms.nll + terms.tempered_kl) / (model.num_data * samples)).backward()

        variance = _variance(guide, backward, draws, device)
        rows.append({"arch": run.config.arch, "batch": batch, "precision": precision, "candidate": name} | variance)
    one = rows[0]
    for row in rows:
        for key in ("loc", "log_scale"):
            row[f"{key}_ratio"] = row[key] / one[key]
            row[f"{key}_efficiency"] = one["ms"] * one[key] / (row["ms"] * row[key])
    return rows


def _variance(
    guide: guides.MeanField, backward: Callable[[], None], draws: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds of a gradient, and the traces of the covariance of ``draws`` gradients."""
    seconds = []
    mean = {"loc": torch.zeros_like(guide.loc), "log_scale": torch.zeros_like(guide.log_scale)}
    spread = {key: torch.zeros_like(value) for key, value in mean.items()}
    for draw in range(1, draws + 1):
        wait(device)
        began = time.perf_counter()
        guide.zero_grad()
        backward()
        wait(device)
        seconds.append(time.perf_counter() - began)
        for key in mean:  # Welford's update: the noise may be far smaller than the mean
            grad = getattr(guide, key).grad
            before = grad - mean[key]
            mean[key] += before / draw
            spread[key] += before * (grad - mean[key])
    traces = {key: float(value.sum()) / (draws - 1) for key, value in spread.items()}
    return {"draws": draws, "ms": 1000 * statistics.median(seconds), **traces}
