"""Test accuracy and MACE against % of weights remaining for several runs: ``python -m plots.bayesian_vs_deterministic RUN RUN -o FILE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from pyro_lottery.errors import UserError
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.figures import PALETTE, percent_axis, save
from pyro_lottery.runs.loaded import check_levels, load_run

PROG = "python -m plots.bayesian_vs_deterministic"


def plot(runs: list[str], path: str) -> None:
    """Plot the runs in one figure at ``path`` (PNG, SVG or PDF by its suffix).

    Raises ``UserError`` for a regression, for a run without a finished level, and for runs of different networks, data or epochs.
    """
    loaded = [load_run(name) for name in runs]
    titles = {}
    for run in loaded:
        check_levels(run, None)
        if run.shape.num_classes is None:
            raise UserError(f"{run.folder.path} has real targets; this figure shows accuracies")
        config = run.config
        title = f"{config.arch}, {config.data_name}, {config.epochs} epoch{'s' * (config.epochs != 1)} a level"
        titles.setdefault(title, run.folder.path)
    if len(titles) > 1:
        (one, first), (other, second) = list(titles.items())[:2]
        raise UserError(f"{first} is {one}, and {second} is {other}; compare runs of the same network, data and epochs")
    figure = Figure(figsize=(6, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    lowest = 100.0
    for color, run in zip(cycle(PALETTE), loaded, strict=False):
        results, config = run.results, run.config
        percent = 100 * results["density"]
        lowest = min(lowest, percent.min())
        top.plot(percent, 100 * results["test_accuracy"], "o-", color=color, label=f"{config.guide}, {config.score}")
        top.axhline(100 * results["test_accuracy"].iloc[0], color=color, ls=":")
        bottom.plot(percent, results["mace"], "o-", color=color)
    top.set(ylabel="test accuracy at the end (%)", title=next(iter(titles)).replace("$", r"\$"))
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
