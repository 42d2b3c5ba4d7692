"""Learning-rate rewinding against rewinding of the values (paper, figure 8): ``python -m plots.fig8 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import GUIDES, Finished, of_guide, treated
from plots.command import main
from plots.style import Line, Plot, accuracies, curves


def lines(levels: pd.DataFrame) -> list[Line]:
    """IMP and LRR, Bayesian and deterministic; none of a network without LRR."""
    if not len(treated(levels, rewind="lr")):
        return []
    return [
        Line(f"{GUIDES[guide]}, {kind}", of_guide(levels, guide, rewind=rewind), look)
        for guide, rewind, kind, look in (
            ("mean_field", "init", "IMP", 0),
            ("mean_field", "lr", "LRR", 5),
            ("deterministic", "init", "IMP", 6),
            ("deterministic", "lr", "LRR", 1),
        )
    ]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    return curves(finished, "Learning-rate rewinding", [accuracies(finished, lines)])


if __name__ == "__main__":
    sys.exit(main("fig8"))
