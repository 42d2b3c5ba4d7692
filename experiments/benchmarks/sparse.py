"""Question: what do a training step and a prediction cost at a low density, compared with the dense Bayesian network?

For each run folder, the masks are those of one pruning of its trained dense network, by SNR and by magnitude. In every
round, each candidate does one training step, or predicts all images, on the same batch of random images. ``dense`` is the
Bayesian network without a mask; ``masked`` has the mask and dense layers (``--sparse off``); ``sparse`` is ``--sparse
auto``. Writes ``OUT/sparse.csv`` and prints it as Markdown.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import pyro_lottery as pl
from experiments.benchmarks.report import markdown, write
from experiments.benchmarks.steps import BATCH
from experiments.benchmarks.timing import Step, ratio_rows, time_steps
from pyro_lottery import guides, machine, masks, training
from pyro_lottery.runs.trained import TrainedNetwork
from pyro_lottery.types import Mask

MASKED = {"masked": "off", "sparse": "auto"}
SCORES = {"snr": pl.scores.snr, "magnitude": pl.scores.magnitude}
COLUMNS = {
    "network": "{arch}, B {batch}", "precision": "{precision}", "candidate": "{candidate}", "ms": "{step_ms:.0f}",
    "ratio to dense": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.sparse", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of mean_field runs with a finished level 0")
    parser.add_argument("--density", nargs="+", type=float, default=[0.012, 0.1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--images", type=int, help="images of a prediction from ten samples (default: as a training batch)"
    )
    parser.add_argument("--precision", default="32", help="32 or bf16, of dense layers")
    parser.add_argument("--estimator", default="weights", help="weights or local")
    parser.add_argument("--out", type=Path, default=Path("runs/sparse"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given = parser().parse_args(arguments)
    pyro.enable_validation(False)
    machine.keep_memory()
    print(
        f"{machine.processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.python_version()}\n"
    )
    rows = list[dict[str, Any]]()
    for path in given.runs:
        new = rows_of(path, given)
        rows += new
        write(given.out / "sparse.csv", rows)
        print(markdown(new, COLUMNS), end="\n\n", flush=True)


def rows_of(path: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one run's network."""
    run = pl.load_run(path)
    arch, shape, trained = run.config.arch, run.shape, run.level(0).posterior
    batch = BATCH.get(arch, run.config.batch_size)
    x = torch.randn(batch, shape.in_channels, *shape.image_size)
    y, images = torch.randint(shape.num_classes or 1, (batch,)), torch.randn(given.images or batch, *x.shape[1:])
    found: dict[str, Mask] = {
        f"{density:.1%} by {name}": masks.shrink(masks.full(trained), score(trained), 1 - density)
        for density in given.density
        for name, score in SCORES.items()
    }

    def ways(make: Callable[[TrainedNetwork, Mask, str], Step]) -> dict[str, Step]:
        steps = {"dense": make(run.level(0).load_model(), {}, "off")}
        for what, mask in found.items():
            steps |= {
                f"{label}, {what}": make(run.level(0).load_model(), mask, sparse) for label, sparse in MASKED.items()
            }
        return steps

    cpu = torch.device("cpu")
    trains = time_steps(
        ways(lambda net, mask, sparse: training_step(net, mask, sparse, x, y, given)), given.rounds, cpu
    )
    predicts = time_steps(
        ways(lambda net, mask, sparse: prediction(net, mask, sparse, images, given)), given.rounds, cpu
    )
    rows = ratio_rows(f"step of {arch}", batch, given.precision, trains, "dense")
    return rows + ratio_rows(f"ten samples of {arch}", len(images), given.precision, predicts, "dense")


def training_step(
    net: TrainedNetwork, mask: Mask, sparse: str, x: Tensor, y: Tensor, given: argparse.Namespace
) -> Step:
    """The step that :func:`pyro_lottery.train` takes."""
    pruned, layers, elbo = (
        pl.handlers.sparsify(mask),
        pl.handlers.sparse_layers(sparse),
        pl.ELBO(estimator=given.estimator),
    )
    with pruned:
        net.guide.compress_()  # type: ignore[operator]
    optimizer = torch.optim.Adam(guides.parameter_groups(net.model, net.guide, 1e-4), 1e-4, fused=True)

    def step() -> None:
        with pruned, layers:
            training.step(net.model, net.guide, elbo, optimizer, x, y, precision=given.precision)

    return step


def prediction(net: TrainedNetwork, mask: Mask, sparse: str, images: Tensor, given: argparse.Namespace) -> Step:
    """Class probabilities of all images from ten posterior samples."""
    pruned, layers = pl.handlers.sparsify(mask), pl.handlers.sparse_layers(sparse)

    def predict() -> None:
        with pruned, layers:
            pl.predict(net.model, net.guide, images, 10, precision=given.precision)

    return predict


if __name__ == "__main__":
    main()
