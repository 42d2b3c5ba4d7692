"""Test accuracy and MACE against weights remaining, by score (paper, figure 1): ``python -m plots.fig1 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import ACCURACIES, Finished, treated
from plots.command import main
from plots.style import Line, Panels, Plot, curves


def lines(levels: pd.DataFrame) -> list[Line]:
    """The three scores of a Bayesian network, and the deterministic network."""
    scores = ("snr", "magnitude", "squared_sum")
    bayesian = [Line(f"Bayesian, {s}", treated(levels, guide="mean_field", score=s), i) for i, s in enumerate(scores)]
    return [*bayesian, Line("deterministic", treated(levels, guide="deterministic", score="magnitude"), 6)]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    rows = [Panels("accuracy", ACCURACIES[finished.accuracy], lines), Panels("mace", "MACE", lines)]
    return curves(finished, "Accuracy and calibration of tickets by pruning score", rows)


if __name__ == "__main__":
    sys.exit(main("fig1"))
