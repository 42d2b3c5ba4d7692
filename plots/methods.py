"""Quality against cost of the methods of experiments.methods: ``python -m plots.methods OUT/methods.csv -o FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from plots.style import MARKERS, Plot
from pyro_lottery.runs.figures import PALETTE, percent_axis


def plot(means: pd.DataFrame, title: str) -> Plot:
    """NLL against seconds, a panel per density with the Pareto front of the sparse networks, and NLL against density."""
    densities = list(dict.fromkeys(means["wanted"]))
    figure = Figure(figsize=(4 * (len(densities) + 1), 5.5), layout="constrained")
    panels = figure.subplots(1, len(densities) + 1, squeeze=False)[0]
    names = list(dict.fromkeys(means["method"]))
    looks = {
        name: (PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]) for i, name in enumerate(names)
    }
    for axes, density in zip(panels, densities, strict=False):
        rows = means[means["wanted"] == density]
        for row in rows.itertuples():
            color, marker = looks[str(row.method)]
            axes.plot([row.seconds], [row.nll], marker, color=color, ls="none")
        front = pareto(rows[rows["method"] != "dense"])
        axes.plot(front["seconds"], front["nll"], color="0.7", lw=1, drawstyle="steps-post", zorder=0)
        axes.set(xlabel="seconds of training", ylabel="NLL", title=f"{100 * float(density):g} % of the weights")
    for name in names:
        rows = means[means["method"] == name].sort_values("wanted")
        color, marker = looks[name]
        panels[-1].plot(100 * rows["wanted"], rows["nll"], marker, ls="-", color=color, label=name)
    panels[-1].set(ylabel="NLL")
    percent_axis(panels[-1], 100 * min(densities))
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(title)
    return Plot(figure, means)


def pareto(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other beats in both seconds and NLL, by rising seconds.

    >>> pareto(pd.DataFrame({"seconds": [1, 2, 3], "nll": [3.0, 4.0, 1.0]}))["seconds"].tolist()
    [1, 3]
    """
    rows = rows.sort_values(["seconds", "nll"])
    return rows[rows["nll"] < rows["nll"].cummin().shift(fill_value=float("inf"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m plots.methods", description=__doc__)
    parser.add_argument("table", type=Path, help="methods.csv that experiments.methods has written beside its figure")
    parser.add_argument("-o", "--output", type=Path, default=Path("figures"), help="folder for the files")
    given = parser.parse_args()
    plot(pd.read_csv(given.table), "").save("methods", given.output)
