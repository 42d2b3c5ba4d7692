"""How long runs will take: from the steps of finished levels like theirs, or else from a step measured here and now."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from experiments.jobs import Job
from pyro_lottery import data, prediction, runs, training
from pyro_lottery.config import Config
from pyro_lottery.data import Data
from pyro_lottery.tables import list_runs, with_derived

STEPS = 4
"""Steps to measure, after as many to warm up."""


def seconds_left(job: Job, levels: int, root: Path) -> float:
    """Seconds that ``levels`` levels of ``job`` will take: epochs × steps × step, and the predictions after each epoch
    and at the end.
    """
    config = job.config
    train, test = _sizes(config.dataset, config.data_dir)
    train, test = config.train_size or train, config.test_size or test
    step = _finished_step(config, root)
    measured, forward = measure(_like(config))
    step = step or measured
    samples = 1 if config.guide == "deterministic" else config.train_samples
    final = 1 if config.guide == "deterministic" else config.eval_samples
    history = min(config.history_samples or samples, final)
    steps = training.steps_per_epoch(train, config.batch_size)
    return levels * (config.epochs * (steps * step + history * test * forward) + final * test * forward)


@cache
def measure(config: Config) -> tuple[float, float]:
    """Seconds of a training step of ``config``, and of the prediction of one image from one sample, on random images."""
    device = runs.resolve_device(config.device)
    config = replace(config, precision=prediction.resolve_precision(config.precision, device))
    dataset = _random_images(config, device)
    model, guide = runs.build(config, runs.shape_of(dataset), device)
    options = {"batch_size": config.batch_size, "train_samples": config.train_samples, "precision": config.precision}
    history = training.train(model, guide, dataset, epochs=2, milestones=(), history_samples=1, **options)
    began = time.perf_counter()
    prediction.predict(model, guide, dataset.test, 1, precision=config.precision)
    return history[-1]["seconds"] / STEPS, (time.perf_counter() - began) / len(dataset.test)


def _random_images(config: Config, device: torch.device) -> Data:
    if config.dataset in data.DOWNLOADS:
        shape, classes = (3, 32, 32), data.DOWNLOADS[config.dataset][2]
    else:
        known = data.load(config.dataset, config.data_dir)
        shape, classes = (known.in_channels, *known.image_size), known.num_classes
    count = max(STEPS * config.batch_size, classes)
    pixels, labels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.arange(count) % classes
    few = max(config.batch_size, classes)
    return data.from_tensors(pixels, labels, pixels[:few], labels[:few]).to(device)


@cache
def _sizes(dataset: str, data_dir: str) -> tuple[int, int]:
    if dataset in data.DOWNLOADS:
        return data.DOWNLOADS[dataset][:2]
    known = data.load(dataset, data_dir)
    return len(known.train), len(known.test)


def _like(config: Config) -> Config:
    """What a step costs depends on no other options, so that one measurement serves many runs."""
    names = ("arch", "patch_size", "dataset", "data_dir", "guide", "batch_size", "train_samples", "device", "precision")
    return Config(**{name: getattr(config, name) for name in names}, run_dir="")


def _finished_step(config: Config, root: Path) -> float | None:
    wanted = replace(_like(config), precision="32")
    for run in list_runs(root) if root.is_dir() else []:
        for _, found in with_derived(run):
            rows = found.folder.results()
            if rows and replace(_like(found.config), precision="32", device=wanted.device) == wanted:
                return rows[-1].step_ms / 1000
    return None


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
