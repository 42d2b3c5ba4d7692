"""Accuracy of deterministic, Bayesian and transplanted tickets (paper, figure 5): ``python -m plots.fig5 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import Finished, of_guide
from plots.command import main
from plots.style import Line, Plot, accuracies, curves


def lines(levels: pd.DataFrame) -> list[Line]:
    """The three kinds of ticket."""
    return [
        Line("Bayesian, snr", of_guide(levels), 0),
        Line("deterministic", of_guide(levels, "deterministic"), 6),
        Line("transplanted", of_guide(levels, score="magnitude", treatment="transplant"), 3),
    ]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    return curves(finished, "Transplanted tickets", [accuracies(finished, lines)])


if __name__ == "__main__":
    sys.exit(main("fig5"))
