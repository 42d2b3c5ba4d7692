"""The command line of all figures of the paper: read finished runs, plot them, write PNG, SVG and CSV."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.study.finished import ACCURACIES, Finished, read
from pyro_lottery.errors import UserError
from pyro_lottery.runs.cli import Parser, run_command


def main(stem: str, arguments: Sequence[str] | None = None) -> int:
    """``python -m plots.STEM RUNS``: plot one figure; returns the exit code."""
    module = importlib.import_module(f"plots.{stem}")
    given = parser(stem, str(module.__doc__)).parse_args(arguments)

    def work() -> None:
        finished = read(given.runs, given.protocol, given.data, given.accuracy, given.arch)
        for path in module.plot(finished).save(stem, given.output):
            print(path)

    return run_command(f"python -m plots.{stem}", work, arguments, resumes=False)


def parser(stem: str, description: str) -> Parser:
    """The options of a figure."""
    parser = Parser(f"python -m plots.{stem}", description)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of runs, or of the evidence that experiments.claims has written"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("figures"), help="folder for the files")
    parser.add_argument("--protocol", help="which runs, if the folder holds several protocols")
    parser.add_argument("--data", help="which runs, if the folder holds several data sets, for example 'CIFAR-10'")
    parser.add_argument("--arch", nargs="+", default=(), help="networks to show; default: all")
    parser.add_argument("--accuracy", default="test_accuracy", help=f"{' or '.join(ACCURACIES)} (the paper's)")
    return parser


def plot_figures(stems: Iterable[str], finished: Finished, folder: Path) -> list[str]:
    """Plot several figures; returns why each figure that cannot be plotted is left out."""
    left_out = []
    for stem in stems:
        try:
            importlib.import_module(f"plots.{stem}").plot(finished).save(stem, folder)
        except UserError as error:
            left_out.append(f"{stem}: {error}")
    return left_out
