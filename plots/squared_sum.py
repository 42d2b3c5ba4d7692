"""The scores by the paper's formulas and by a public fork's: ``python -m plots.squared_sum RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import ACCURACIES, Finished, treated
from plots.command import main
from plots.style import Line, Panels, Plot, curves

SCORES = {
    "snr": "snr |μ|/σ",
    "mean_over_variance": "fork: |μ|/(σ²+1e-6)",
    "squared_sum": "squared_sum √(μ²+σ²)",
    "squared_sum_log_scale": "fork: μ²+(log σ)²",
}


def lines(levels: pd.DataFrame) -> list[Line]:
    """One line per formula."""
    return [
        Line(label, treated(levels, guide="mean_field", score=score), look)
        for look, (score, label) in enumerate(SCORES.items())
    ]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    panels = Panels("accuracy", ACCURACIES[finished.accuracy], lines)
    return curves(finished, "The scores as the paper and as a public fork write them", [panels])


if __name__ == "__main__":
    sys.exit(main("squared_sum"))
