"""Mean training time per level (paper, table 1): ``python -m plots.table1 RUNS -o FOLDER``."""

import math
import sys

import pandas as pd
from matplotlib.figure import Figure

from experiments.study.finished import Finished, of_guides
from plots.command import main
from plots.style import Plot, finish
from pyro_lottery.errors import UserError


def times(levels: pd.DataFrame) -> pd.DataFrame:
    """Minutes per level by network, mean over levels and seeds, and their ratio."""
    levels = of_guides(levels)
    if not len(levels):
        raise UserError("no run pruned by snr and no deterministic one is finished; run python -m experiments.table1")
    minutes = levels.pivot_table(index="arch", columns="guide", values="train_seconds", aggfunc="mean") / 60
    minutes = minutes.reindex(columns=["deterministic", "mean_field"])
    found = pd.DataFrame({"deterministic_min": minutes["deterministic"], "bayesian_min": minutes["mean_field"]})
    return found.assign(ratio=minutes["mean_field"] / minutes["deterministic"]).reset_index(names="network")


def plot(finished: Finished) -> Plot:
    """The table as a figure, with the hardware of the runs."""
    levels = finished.own_levels[finished.own_levels["arch"].isin(finished.archs)]
    table, seeds = times(levels), of_guides(levels).groupby(["arch", "guide"])["seed"].nunique()
    figure = Figure(figsize=(7.5, 1.9 + 0.3 * len(table)), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    header = ["network", "deterministic (min)", "Bayesian (min)", "ratio"]
    axes.table(cells, colLabels=header, loc="center", cellLoc="center").scale(1, 1.4)
    hardware = sorted(levels["hardware"].unique())
    finish(figure, finished, "Training time per level", f"on {'; '.join(hardware)}", seeds)
    return Plot(figure, table)


def _cell(value):
    if isinstance(value, str):
        return value
    return "–" if math.isnan(value) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main("table1"))
