"""Accuracy of tickets by learning rate and warm-up (paper, figure 7): ``python -m plots.fig7 RUNS -o FOLDER``."""

import sys

import pandas as pd

from experiments.study.finished import GUIDES, Finished, of_guide
from plots.command import main
from plots.style import Line, Plot, accuracies, curves


def lines(levels: pd.DataFrame, guide: str) -> list[Line]:
    """One line per learning rate and warm-up."""
    levels = of_guide(levels, guide)
    settings = sorted({(warmup, lr) for lr, warmup in zip(levels["lr"], levels["warmup_epochs"], strict=True)})
    return [
        Line(
            f"rate {lr:g}" + (f", warm-up {warmup}" if warmup else ""),
            levels[(levels["lr"] == lr) & (levels["warmup_epochs"] == warmup)],
            look,
            dense=False,
        )
        for look, (warmup, lr) in enumerate(settings)
    ]


def plot(finished: Finished) -> Plot:
    """One column per network; Bayesian above, deterministic below."""
    rows = [
        accuracies(finished, lambda levels, guide=guide: lines(levels, guide), name) for guide, name in GUIDES.items()
    ]
    levels = finished.all_levels
    several = levels.groupby("arch")["lr"].transform("nunique") > 1
    return curves(finished, "Learning rate and warm-up", rows, levels[several] if several.any() else levels)


if __name__ == "__main__":
    sys.exit(main("fig7"))
