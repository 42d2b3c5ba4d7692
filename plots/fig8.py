"""Learning-rate rewinding against rewinding of the values (paper, figure 8): ``python -m plots.fig8 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import ACCURACIES, Finished, treated
from plots.command import main
from plots.style import Line, Panels, Plot, curves


def lines(levels: pd.DataFrame) -> list[Line]:
    """IMP and LRR, Bayesian and deterministic."""
    return [
        Line(f"{name}, {kind}", treated(levels, guide=guide, score=score, rewind=rewind), look)
        for guide, score, name, looks in (
            ("mean_field", "snr", "Bayesian", (0, 5)),
            ("deterministic", "magnitude", "deterministic", (6, 1)),
        )
        for (rewind, kind), look in zip((("init", "IMP"), ("lr", "LRR")), looks, strict=True)
    ]


def plot(finished: Finished) -> Plot:
    """One column per network."""
    return curves(finished, "Learning-rate rewinding", [Panels("accuracy", ACCURACIES[finished.accuracy], lines)])


if __name__ == "__main__":
    sys.exit(main("fig8"))
