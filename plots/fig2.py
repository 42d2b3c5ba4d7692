"""Sparsity per layer at the last level (paper, figure 2): ``python -m plots.fig2 RUNS -o FOLDER``."""

import sys

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.study.finished import Finished
from experiments.study.statistics import depth_slope
from plots.command import main
from plots.style import MARKERS, Plot, finish
from pyro_lottery.errors import UserError
from pyro_lottery.runs.figures import PALETTE

GUIDES = {"mean_field": ("Bayesian, snr", 0), "deterministic": ("deterministic", 6)}


def layers(finished: Finished) -> pd.DataFrame:
    """Per network, guide and layer: mean and standard deviation of the sparsity over seeds, and the rise of sparsity
    with depth in points (mean over seeds), at the last level that all runs pruned by snr and all deterministic runs have.
    """
    frame = finished.layers[finished.layers["arch"].isin(finished.archs)]
    if not len(frame):
        raise UserError("no run pruned by snr and no deterministic one is finished; run python -m experiments.fig2")
    grouped = frame.groupby(["arch", "guide", "level", "depth", "site", "weights"], sort=False)["sparsity"]
    found = pd.DataFrame(
        {"sparsity": grouped.mean(), "std": grouped.std(ddof=1), "seeds": grouped.count()}
    ).reset_index()
    rise = [(arch, guide, depth_slope(rows).mean()) for (arch, guide), rows in frame.groupby(["arch", "guide"])]
    return found.merge(pd.DataFrame(rise, columns=["arch", "guide", "rise"]), on=["arch", "guide"])


def plot(finished: Finished) -> Plot:
    """One panel per network."""
    frame = layers(finished)
    archs = [arch for arch in finished.archs if (frame["arch"] == arch).any()]
    figure = Figure(figsize=(max(6.4, 4.2 * len(archs)), 4.2), layout="constrained")
    for axes, arch in zip(figure.subplots(1, len(archs), squeeze=False)[0], archs, strict=True):
        for guide, (label, look) in GUIDES.items():
            rows = frame[(frame["arch"] == arch) & (frame["guide"] == guide)]
            if not len(rows):
                continue
            label = f"{label}: {rows['rise'].iloc[0]:+.0f} points"
            axes.plot(
                rows["depth"], 100 * rows["sparsity"], MARKERS[look] + "-", color=PALETTE[look], ms=4, label=label
            )
            low, high = (100 * (rows["sparsity"] + sign * rows["std"]) for sign in (-1, 1))
            axes.fill_between(rows["depth"], low, high, color=PALETTE[look], alpha=0.18, lw=0)
        axes.set(xlabel="layer (from the input)", ylabel="weights pruned (%)", title=arch)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, lw=0.5)
        axes.legend(frameon=False, fontsize=8)
    note = (
        "last level that all runs have finished; mean, band: ± one standard deviation; "
        "points: rise of sparsity from first to last layer by a line, without shortcuts"
    )
    finish(figure, finished, "Sparsity per layer", note, frame["seeds"])
    return Plot(figure, frame)


if __name__ == "__main__":
    sys.exit(main("fig2"))
