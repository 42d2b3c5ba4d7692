"""Iterative pruning of one's own network on one's own data, in one call: four examples to copy from.

    python -m experiments.own_data table         breast cancer, a table of 30 features, 2 classes
    python -m experiments.own_data regression    diabetes, a table of 10 features, one real target
    python -m experiments.own_data signal        Breiman's waveforms, 21 values long, 3 classes
    python -m experiments.own_data two_outputs   noisy oscillations from a DataLoader, two real targets

Each prunes to a tenth of the weights in five levels and prints a row per level. If repeated, it prints the finished run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_lottery as pl
from experiments.study.markdown import markdown_table
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.loaded import Run

LEVELS, DENSITY = 5, 0.1
OF_A_TABLE = {"epochs": 20, "milestones": (15,), "batch_size": 32, "lr": 0.003}
OF_A_SIGNAL = {"epochs": 10, "milestones": (8,), "lr": 0.01}


@dataclass(frozen=True)
class Example:
    """A network, its data, and options that suit them."""

    network: nn.Module
    data: pl.data.Data
    options: dict[str, Any] = field(default_factory=dict)
    unit: float = 1.0
    """The divisor of the targets. An RMSE times this is in the targets' own unit."""


def table() -> Example:
    """A perceptron that classifies tumours as benign or malignant from 30 features of 569 biopsies."""
    found: Any = load_breast_cancer()
    train_x, test_x, train_y, test_y = train_test_split(
        found.data, found.target, test_size=0.3, stratify=found.target, random_state=0
    )
    data = pl.data.from_tensors(train_x, train_y, test_x, test_y, classes=found.target_names)
    return Example(perceptron(30, 2), data, OF_A_TABLE)


def regression() -> Example:
    """A perceptron that predicts the progress of diabetes in a year from ten features of 442 patients."""
    found: Any = load_diabetes(scaled=False)
    train_x, test_x, train_y, test_y = train_test_split(found.data, found.target, test_size=0.3, random_state=0)
    # The library does not scale targets; here they are standardised.
    mean, std = train_y.mean(), train_y.std()
    train_y, test_y = ((y[:, None] - mean) / std for y in (train_y, test_y))
    return Example(perceptron(10, 1), pl.data.from_tensors(train_x, train_y, test_x, test_y), OF_A_TABLE, float(std))


def signal() -> Example:
    """A one-dimensional convolution network that classifies three kinds of waveforms; the best possible accuracy is 86 %."""
    train, test = (waveforms(count, seed) for seed, count in enumerate((2000, 5000)))
    return Example(convolution(3), pl.data.from_tensors(*train, *test), OF_A_SIGNAL | {"batch_size": 64})


def two_outputs() -> Example:
    """A one-dimensional convolution network that predicts the frequency and decay of an oscillation, with data from DataLoaders."""
    train, test = (TensorDataset(*oscillations(count, seed)) for seed, count in enumerate((2000, 1000)))
    data = pl.data.from_loaders(DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=500))
    return Example(convolution(2), data, OF_A_SIGNAL | {"epochs": 20, "milestones": (15,)})


def perceptron(features: int, outputs: int) -> nn.Module:
    """Two hidden layers of 64 units."""
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def convolution(outputs: int) -> nn.Module:
    """Two convolutions over time, maximum pooling to five values, and a linear layer."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 5, padding=2), nn.ReLU(), nn.AdaptiveMaxPool1d(5), nn.Flatten(),
        nn.Linear(160, outputs),
    )  # fmt: skip


def waveforms(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Signals [count, 1, 21] of Breiman et al. (1984), Classification and Regression Trees, and their classes 0 to 2.

    Each mixes two of three triangles at random and adds N(0, 1) to each value; the best classifier is right in 86 % of cases.
    """
    generator = np.random.default_rng(seed)
    triangles = np.stack([np.maximum(6 - abs(np.arange(1, 22) - centre), 0) for centre in (7, 15, 11)])
    classes = generator.integers(0, 3, count)
    first, second = triangles[[0, 0, 1]][classes], triangles[[1, 2, 2]][classes]
    share = generator.random((count, 1))
    signals = share * first + (1 - share) * second + generator.normal(size=(count, 21))
    return signals[:, None], classes


def oscillations(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy signals [count, 1, 40] and their frequency (0.5 to 1.5 of the mean) and decay (0 to 1), [count, 2]."""
    generator = torch.Generator().manual_seed(seed)
    frequency, decay, phase = torch.rand(3, count, 1, generator=generator)
    time = torch.linspace(0, 1, 40)
    clean = torch.exp(-3 * decay * time) * torch.sin(2 * torch.pi * (4 * (0.5 + frequency) * time + phase))
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    return noisy[:, None], torch.cat([0.5 + frequency, decay], 1)


EXAMPLES: dict[str, Callable[[], Example]] = {f.__name__: f for f in (table, regression, signal, two_outputs)}


def find(example: Example, run_dir: Path, **options: Any) -> Run:
    """Prune the example's network to a tenth; ``options`` take precedence over the example's."""
    usual = {"levels": LEVELS, "prune_fraction": 1 - DENSITY ** (1 / LEVELS), "kl_temperature": 1.0}
    return pl.find_tickets(example.network, example.data, run_dir=run_dir, **usual | example.options | options)


def markdown(run: Run, unit: float = 1.0) -> str:
    """A row per level: accuracy and NLL for classes; for real targets the RMSE in their unit and the coverage of the 95 %
    interval.
    """
    rows = run.folder.finished()
    names = ("RMSE", "in 95 % interval") if rows[0].is_regression else ("test accuracy", "NLL")
    cells = []
    for row in rows:
        if row.test_accuracy is not None:
            values = f"{100 * row.test_accuracy:.1f} %", f"{row.nll:.3f}"
        else:
            values = f"{(row.rmse or 0.0) * unit:.3g}", f"{100 * (row.coverage_95 or 0.0):.1f} %"
        cells.append((row.level, f"{100 * row.density:.3g} %", *values))
    return "\n".join(markdown_table(("level", "density", *names), cells))


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m experiments.own_data NAME``; returns the exit code."""
    parser = Parser("python -m experiments.own_data", str(__doc__).split("\n")[0])
    parser.add_argument("example", choices=list(EXAMPLES), help=", ".join(EXAMPLES))
    parser.add_options(only=("levels", "epochs", "milestones", "eval_samples", "run_dir"))
    given = vars(parser.parse_args(arguments))
    name = given.pop("example")
    run_dir = Path(given.pop("run_dir", None) or f"runs/own-{name}")

    def work() -> None:
        torch.manual_seed(0)
        example = EXAMPLES[name]()
        print(markdown(find(example, run_dir, **given), example.unit))

    return run_command(parser.prog, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
