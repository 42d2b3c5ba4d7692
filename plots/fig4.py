"""Accuracy of tickets and of their randomised controls (paper, figure 4): ``python -m plots.fig4 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import GUIDES, Finished, of_guide
from plots.command import main
from plots.style import Line, Plot, accuracies, curves
from pyro_lottery.tickets import CONTROLS


def lines(levels: pd.DataFrame, guide: str) -> list[Line]:
    """The tickets of one guide and their four controls; none of a network without controls."""
    if not levels["treatment"].isin(CONTROLS).any():
        return []
    controls = [Line(c, of_guide(levels, guide, treatment=c), look) for look, c in enumerate(CONTROLS, start=1)]
    return [Line("IMP ticket", of_guide(levels, guide), 0), *controls]


def plot(finished: Finished) -> Plot:
    """One column per network; Bayesian above, deterministic below."""
    rows = [
        accuracies(finished, lambda levels, guide=guide: lines(levels, guide), name) for guide, name in GUIDES.items()
    ]
    return curves(finished, "Tickets and their randomised controls", rows)


if __name__ == "__main__":
    sys.exit(main("fig4"))
