"""The scores by the paper's formulas and by a public fork's: ``python -m plots.squared_sum RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import Finished, of_guide
from plots.command import main
from plots.style import Line, Plot, accuracies, curves

SCORES = {
    "snr": "snr |μ|/σ",
    "mean_over_variance": "fork: |μ|/(σ²+1e-6)",
    "squared_sum": "squared_sum √(μ²+σ²)",
    "squared_sum_log_scale": "fork: μ²+(log σ)²",
}


def lines(levels: pd.DataFrame) -> list[Line]:
    """One line per formula."""
    return [Line(label, of_guide(levels, score=s), look) for look, (s, label) in enumerate(SCORES.items())]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    return curves(finished, "The scores as the paper and as a public fork write them", [accuracies(finished, lines)])


if __name__ == "__main__":
    sys.exit(main("squared_sum"))
