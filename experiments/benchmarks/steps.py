"""Question: what does a Bayesian training step cost, compared with a deterministic one and with other libraries?

In every round, each candidate does one training step on the same network and batch of random images, so that other load
on the machine slows all candidates alike. ``det`` is the fastest deterministic step here (channels_last, fused Adam, the
same precision); ``plain`` is the usual one (fp32, NCHW, unfused Adam). ``--run RUN`` also measures the variance of every
estimator's gradient at that run's trained dense network on one batch, and the efficiency 1 / (time × variance).

``--evaluate`` and ``--kernels`` add predictions and the kernels alone. Writes ``OUT/steps.csv``, ``variance.csv``,
``evaluation.csv`` and ``kernels.csv`` and prints them as Markdown; ``python -m plots.speed OUT`` plots them.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_lottery as pl
from experiments.benchmarks.candidates import candidates, classifier, has_peers
from experiments.benchmarks.evaluation import evaluation_rows
from experiments.benchmarks.kernels import kernel_rows
from experiments.benchmarks.report import (
    EVALUATION_COLUMNS,
    KERNEL_COLUMNS,
    STEP_COLUMNS,
    VARIANCE_COLUMNS,
    markdown,
    write,
)
from experiments.benchmarks.timing import ratio_rows, time_steps
from experiments.benchmarks.variance import variance_rows
from pyro_lottery import machine
from pyro_lottery.machine import channels_last, resolve_device
from pyro_lottery.training import precision_for_batch

BATCH = {"resnet20": 128, "resnet18": 32, "vgg11": 64, "vit_tiny": 32}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.steps", description=__doc__)
    parser.add_argument("--arch", nargs="*", default=list(BATCH), help="networks; default: " + " ".join(BATCH))
    parser.add_argument("--batch-size", type=int, help="default: 128 for resnet20, 64 for vgg11, else 32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="auto", help="32, bf16 or auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peers", action="store_true", help="also time torch-blue and bayesian-torch (extra bench)")
    parser.add_argument("--evaluate", type=int, default=0, help="also time ten posterior samples on this many images")
    parser.add_argument("--kernels", type=int, default=0, help="also time each kernel alone, on this many weights")
    parser.add_argument("--run", help="run folder of a mean_field run, for the gradient's variance")
    parser.add_argument("--draws", type=int, default=100, help="gradients per estimator for the variance")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--out", default="runs/speed")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given = parser().parse_args(arguments)
    if given.peers and not has_peers():
        parser().error("--peers needs the extra bench: pip install -e '.[bench]'")
    device = resolve_device(given.device)
    pyro.enable_validation(False)
    machine.keep_memory()  # for every candidate, so that no candidate is slower without it
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.python_version()}\n")
    measure_networks(given, device)
    if given.kernels:
        report(given, "kernels.csv", kernel_rows(given.kernels, given.rounds), KERNEL_COLUMNS)
    if given.run:
        rows = variance_rows(given.run, given.batch_size or 128, given.draws, given.precision, device)
        report(given, "variance.csv", rows, VARIANCE_COLUMNS)


def measure_networks(given: argparse.Namespace, device: torch.device) -> None:
    """Time the steps of each network, and its predictions with ``--evaluate``."""
    rows, evaluated = list[dict[str, Any]](), list[dict[str, Any]]()
    for arch in given.arch:
        torch.manual_seed(0)
        batch = given.batch_size or BATCH.get(arch, 32)
        x = channels_last(torch.randn(batch, 3, given.image_size, given.image_size, device=device))
        y = torch.randint(0, 10, (batch,), device=device)
        precision = precision_for_batch(
            given.precision, classifier(pl.create_model(arch, num_classes=10)).to(device), x
        )
        steps = candidates(arch, x, y, precision, given.peers)
        new = ratio_rows(arch, batch, precision, time_steps(steps, given.rounds, device), "det")
        rows += new
        write(Path(given.out) / "steps.csv", rows)
        print(markdown(new, STEP_COLUMNS), end="\n\n", flush=True)
        if given.evaluate:
            images = channels_last(torch.randn(given.evaluate, 3, given.image_size, given.image_size, device=device))
            evaluated += evaluation_rows(arch, images, 10, given.rounds, precision)
            write(Path(given.out) / "evaluation.csv", evaluated)
    if evaluated:
        print(markdown(evaluated, EVALUATION_COLUMNS), end="\n\n", flush=True)


def report(given: argparse.Namespace, name: str, rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> None:
    """Write a table as CSV and print it as Markdown."""
    write(Path(given.out) / name, rows)
    print(markdown(rows, columns), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
