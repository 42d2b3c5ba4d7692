"""Test accuracy and MACE against weights remaining, by score (paper, figure 1): ``python -m plots.fig1 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import Finished, of_guide
from plots.command import main
from plots.style import Line, Panels, Plot, accuracies, curves


def lines(levels: pd.DataFrame) -> list[Line]:
    """The three scores of a Bayesian network, and the deterministic network."""
    scores = ("snr", "magnitude", "squared_sum")
    bayesian = [Line(f"Bayesian, {score}", of_guide(levels, score=score), look) for look, score in enumerate(scores)]
    return [*bayesian, Line("deterministic", of_guide(levels, "deterministic"), 6)]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    rows = [accuracies(finished, lines), Panels("mace", "MACE", lines)]
    return curves(finished, "Accuracy and calibration of tickets by pruning score", rows)


if __name__ == "__main__":
    sys.exit(main("fig1"))
