"""Test accuracy and MACE against % of weights remaining for several runs: ``python -m plots.bayesian_vs_deterministic RUN RUN -o FILE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.figures import PALETTE, percent_axis, save
from pyro_lottery.runs.loaded import load_run

PROG = "python -m plots.bayesian_vs_deterministic"


def plot(runs: list[str], path: str) -> None:
    """Plot the runs in one figure at ``path`` (PNG, SVG or PDF by its suffix)."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    lowest = 100.0
    for color, name in zip(cycle(PALETTE), runs, strict=False):
        run = load_run(name)
        results, config = run.results, run.config
        percent = 100 * results["density"]
        lowest = min(lowest, percent.min())
        top.plot(percent, 100 * results["test_accuracy"], "o-", color=color, label=f"{config.guide}, {config.score}")
        top.axhline(100 * results["test_accuracy"][0], color=color, ls=":")
        bottom.plot(percent, results["mace"], "o-", color=color)
    top.set(
        ylabel="test accuracy at the end (%)", title=f"{config.arch}, {config.dataset}, {config.epochs} epochs a level"
    )
    top.legend(frameon=False)
    bottom.set(ylabel="MACE")
    percent_axis(bottom, lowest)
    save(figure, Path(path))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("-o", "--output", default="bayesian_vs_deterministic.png", help="file to write")
    given = parser.parse_args(arguments)
    return run_command(PROG, lambda: plot(given.runs, given.output), arguments, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
