"""Accuracy of tickets and of their randomised controls (paper, figure 4): ``python -m plots.fig4 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import ACCURACIES, Finished, treated
from plots.command import main
from plots.style import Line, Panels, Plot, curves
from pyro_lottery.tickets import CONTROLS


def lines(levels: pd.DataFrame, guide: str) -> list[Line]:
    """The tickets of one guide and their four controls."""
    of = {"guide": guide, "score": "magnitude" if guide == "deterministic" else "snr"}
    controls = [Line(c, treated(levels, treatment=c, **of), i) for i, c in enumerate(CONTROLS, start=1)]
    return [Line("IMP ticket", treated(levels, **of), 0), *controls]


def plot(finished: Finished) -> Plot:
    """One column per network; Bayesian above, deterministic below."""
    rows = [
        Panels("accuracy", f"{name}\n{ACCURACIES[finished.accuracy]}", lambda levels, guide=guide: lines(levels, guide))
        for guide, name in (("mean_field", "Bayesian"), ("deterministic", "deterministic"))
    ]
    return curves(finished, "Tickets and their randomised controls", rows)


if __name__ == "__main__":
    sys.exit(main("fig4"))
