"""Test accuracy and MACE against % of weights remaining for several runs: ``python -m plots.bayesian_vs_deterministic RUN RUN -o FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from pyro_lottery.runs.figures import PALETTE, percent_axis, save
from pyro_lottery.runs.loaded import load_run


def plot(runs: list[str], path: str) -> None:
    """Plot the runs in one figure at ``path`` (PNG, SVG or PDF by its suffix)."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    lowest = 100.0
    for color, name in zip(PALETTE, runs, strict=False):
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m plots.bayesian_vs_deterministic", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("-o", "--output", default="bayesian_vs_deterministic.png", help="file to write")
    arguments = parser.parse_args()
    plot(arguments.runs, arguments.output)
