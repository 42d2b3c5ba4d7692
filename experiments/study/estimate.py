"""How long runs will take: from the steps of similar finished levels, or else from a step measured now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from experiments.study.jobs import Job
from pyro_lottery import data, machine, prediction, training
from pyro_lottery.data import Data
from pyro_lottery.runs import build
from pyro_lottery.runs.config import Config
from pyro_lottery.tables import list_runs, with_derived

STEPS, ROUNDS = {"cpu": 4, "cuda": 50}, 3
"""Steps to measure, and how often, after the same number of steps of warm-up. An epoch's end waits for a GPU."""
OF_A_STEP = (
    "arch", "patch_size", "dataset", "data_dir", "image_size", "guide", "batch_size", "train_samples", "device", "precision",
)  # fmt: skip
"""The options that the cost of a step depends on."""


def seconds_left(job: Job, levels: Collection[int], root: Path) -> float:
    """Seconds that ``levels`` of ``job`` will take, from the steps of finished levels if there are any."""
    step, forward = measure(like(job.config))
    return seconds_of(job.config, levels, _finished_step(job.config, root) or step, forward)


def seconds_of(config: Config, levels: Collection[int], step: float, forward: float) -> float:
    """Seconds of ``levels``: epochs × steps × step, plus the predictions after each epoch and at the end."""
    train, test, *_ = sizes(config.dataset, config.data_dir, config.image_size)
    train, test = config.train_size or train, config.test_size or test
    samples = 1 if config.guide == "deterministic" else config.train_samples
    final = 1 if config.guide == "deterministic" else config.eval_samples
    history = min(config.history_samples or samples, final)
    steps = training.steps_per_epoch(train, config.batch_size)
    epochs = sum(map(config.epochs_of, levels))
    return epochs * (steps * step + test * history * forward) + len(levels) * test * final * forward


@cache
def measure(config: Config) -> tuple[float, float]:
    """Seconds of a training step of ``config``, and of the prediction of one image from one sample, on random images."""
    device = machine.resolve_device(config.device)
    dataset = _random_images(config, device)
    model, guide = build.build(config, build.shape_of(dataset))
    model.to(device)
    guide.to(device)
    precision = training.precision_for_data(config.precision, model, dataset, config.batch_size)
    options = {"batch_size": config.batch_size, "train_samples": config.train_samples, "precision": precision}
    history = training.train(model, guide, dataset, epochs=1 + ROUNDS, milestones=(), history_samples=1, **options)
    passes = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        prediction.predict(model, guide, dataset.test, 1, precision=precision).cpu()  # a GPU is waited for
        passes.append(time.perf_counter() - began)
    step = statistics.median(row["seconds"] for row in history[1:]) / STEPS[device.type]
    return step, statistics.median(passes) / len(dataset.test)


def _random_images(config: Config, device: torch.device) -> Data:
    _, _, channels, size, classes = sizes(config.dataset, config.data_dir, config.image_size)
    count = max(STEPS[device.type] * config.batch_size, classes)  # a folder may have 1,000 classes and more
    pixels = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8)
    labels, few = torch.arange(count) % classes, min(count, prediction.BATCH)
    return data.from_tensors(pixels, labels, pixels[:few], labels[:few]).to(device)


@cache
def sizes(dataset: str, data_dir: str, image_size: int | None = None) -> tuple[int, int, int, tuple[int, int], int]:
    """Training and test images, channels, height and width, and classes. Nothing is downloaded."""
    if dataset in data.DOWNLOADS:
        train, test, classes = data.DOWNLOADS[dataset]
        size = image_size or 32
        return train, test, 3, (size, size), classes
    known = data.load(dataset, data_dir, image_size=image_size)
    return len(known.train), len(known.test), known.in_channels, known.image_size, known.num_classes


def like(config: Config) -> Config:
    """``config`` with only the options of ``OF_A_STEP``, so that one measurement serves many runs."""
    return Config(**{name: getattr(config, name) for name in OF_A_STEP}, run_dir="")


def _finished_step(config: Config, root: Path) -> float | None:
    wanted = replace(like(config), precision="32")
    for run in list_runs(root) if root.is_dir() else []:
        for _, found in with_derived(run):
            rows = found.folder.results()
            if rows and replace(like(found.config), precision="32", device=wanted.device) == wanted:
                return rows[-1].step_ms / 1000
    return None


def duration(seconds: float) -> str:
    """Seconds in a readable unit.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
