"""MACE of transplanted and of fully Bayesian tickets (paper, figure 9): ``python -m plots.fig9 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import Finished
from plots import fig5
from plots.command import main
from plots.style import Line, Panels, Plot, curves


def lines(levels: pd.DataFrame) -> list[Line]:
    """Figure 5's lines without the deterministic network."""
    return [line for line in fig5.lines(levels) if line.label != "deterministic"]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    return curves(finished, "Calibration of transplanted tickets", [Panels("mace", "MACE", lines)])


if __name__ == "__main__":
    sys.exit(main("fig9"))
