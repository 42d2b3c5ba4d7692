"""Accuracy of deterministic, Bayesian and transplanted tickets (paper, figure 5): ``python -m plots.fig5 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import ACCURACIES, Finished, treated
from plots.command import main
from plots.style import Line, Panels, Plot, curves


def lines(levels: pd.DataFrame) -> list[Line]:
    """The three kinds of ticket."""
    return [
        Line("Bayesian, snr", treated(levels, guide="mean_field", score="snr"), 0),
        Line("deterministic", treated(levels, guide="deterministic", score="magnitude"), 6),
        Line("transplanted", treated(levels, treatment="transplant"), 3),
    ]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    return curves(finished, "Transplanted tickets", [Panels("accuracy", ACCURACIES[finished.accuracy], lines)])


if __name__ == "__main__":
    sys.exit(main("fig5"))
