"""Question: what does an exported ticket cost to keep and to predict with, and how good is one pass of moments?

For each level of a run, each form is exported to ONNX and timed with ONNX Runtime, beside the sparse layers of this library on
the small ticket file; in every round each candidate predicts the same images. Then accuracy and NLL of mean, draws and moments
on all test images, and bytes and accuracy of the files. Writes exports.csv, quality.csv and sizes.csv to ``OUT`` and prints them
as Markdown.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pyro_lottery as pl
from experiments.benchmarks.report import markdown, write
from experiments.benchmarks.timing import Step, ratio_rows, time_steps
from pyro_lottery import machine, packed
from pyro_lottery.exports.predictor import Predictor
from pyro_lottery.runs.predicting import open_folder

BASE = "ONNX Runtime, ten draws"
COLUMNS = {
    "network": "{arch}, B {batch}", "density": "{density:.1%}", "candidate": "{candidate}", "ms": "{step_ms:.2f}",
    "ratio to ten draws": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
QUALITY = {
    "network": "{arch}", "density": "{density:.1%}", "prediction": "{prediction}", "accuracy %": "{accuracy:.2f}",
    "NLL": "{nll:.4f}", "ECE": "{ece:.4f}", "difference of NLL to 100 draws": "{difference:+.4f}",
}  # fmt: skip

SIZES = {
    "network": "{arch}", "density": "{density:.1%}", "file": "{file}", "bytes": "{bytes:,}", "ratio to dense": "{ratio:.3f}",
    "accuracy %": "{accuracy:.2f}", "NLL": "{nll:.4f}",
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.exports", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of mean_field runs")
    parser.add_argument("--levels", nargs="+", type=int, help="default: all finished levels")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draws", type=int, default=100, help="draws that moments are compared with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", help="folder with the runs' data, if it has moved")
    parser.add_argument("--out", type=Path, default=Path("runs/exports"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given = parser().parse_args(arguments)
    machine.keep_memory()
    torch.set_num_threads(given.threads)
    print(
        f"{machine.processor_name()}, {given.threads} threads, torch {torch.__version__}, {platform.python_version()}\n"
    )
    times, quality, sizes = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    for path in given.runs:
        run = pl.load_run(path)
        for level in given.levels or run.results["level"].tolist():
            density = float(run.row(level).density)
            with tempfile.TemporaryDirectory() as folder:
                facts = _export(run, level, Path(folder), given)
                for batch in given.batch:
                    steps = _candidates(run, Path(folder), batch, given)
                    rows = ratio_rows(
                        f"level {level}", batch, "32", time_steps(steps, given.rounds, torch.device("cpu")), BASE
                    )
                    times += [row | {"arch": run.config.arch, "density": density} for row in rows]
            quality += _quality(run, level, density, facts, given)
            sizes += _sizes(run, level, density, facts, given)
            for name, rows in (("exports", times), ("quality", quality), ("sizes", sizes)):
                write(given.out / f"{name}.csv", rows)
    print(markdown(times, COLUMNS), end="\n\n")
    print(markdown(quality, QUALITY), end="\n\n")
    print(markdown(sizes, SIZES), flush=True)


def _export(run: Any, level: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"data_dir": given.data_dir, "samples": 10}
    found = {"draws": run.level(level).export(folder / "draws", "draws", **options).facts}
    for form in ("mean", "moments"):
        found[form] = run.level(level).export(folder / form, form, data_dir=given.data_dir).facts
    run.level(level).export(folder / "packed", format="safetensors", **options)
    return found


def _candidates(run: Any, folder: Path, batch: int, given: argparse.Namespace) -> dict[str, Step]:
    images = run.load_data("cpu", given.data_dir).test.inputs[:batch].numpy()
    networks: dict[str, Predictor] = {
        "ONNX Runtime, mean": Predictor(folder / "mean", given.threads),
        BASE: Predictor(folder / "draws", given.threads),
        "ONNX Runtime, moments": Predictor(folder / "moments", given.threads),
        "sparse layers, ten draws": open_folder(folder / "packed", backend="sparse"),
        "dense layers, ten draws": open_folder(folder / "packed", backend="dense"),
    }
    return {name: lambda network=network: network(images) for name, network in networks.items()}


def _sizes(
    run: Any, level: int, density: float, facts: dict[str, Any], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of files; a dense file has loc and scale of every weight in fp32."""
    found = {f"{form}, ONNX": facts[form] for form in ("mean", "draws", "moments")}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in packed.DTYPES:
            exported = run.level(level).export(
                Path(folder) / dtype, format="safetensors", dtype=dtype, samples=10, data_dir=given.data_dir
            )
            found[f"ticket, {dtype}"] = exported.facts
    dense = found["ticket, fp32"]["dense_bytes"]
    return [
        {
            "arch": run.config.arch, "level": level, "density": density, "file": name, "bytes": f["bytes"],
            "ratio": f["bytes"] / dense, "accuracy": 100 * f["measured"]["accuracy"], "nll": f["measured"]["nll"],
        }
        for name, f in found.items()
    ]  # fmt: skip


def _quality(
    run: Any, level: int, density: float, facts: dict[str, Any], given: argparse.Namespace
) -> list[dict[str, Any]]:
    test = run.load_data("cpu", given.data_dir).test
    probs = run.level(level).load_model().predict(test, given.draws, run.config.seed)
    many = pl.metrics.all_metrics(probs, test.labels)
    measured = {"mean": facts["mean"]["measured"], "10 draws": facts["draws"]["measured"], f"{given.draws} draws": many}
    measured["moments"] = facts["moments"]["measured"]
    return [
        {
            "arch": run.config.arch, "level": level, "density": density, "prediction": name, "accuracy": 100 * m["accuracy"],
            "nll": m["nll"], "ece": m["ece"], "difference": m["nll"] - many["nll"],
        }
        for name, m in measured.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
