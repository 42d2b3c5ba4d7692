"""Cost of a training step and variance of its gradient: ``python -m plots.speed OUT -o FILE`` plots the output of experiments.benchmarks.steps."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from pyro_lottery.runs.figures import PALETTE, save


def plot(folder: str, path: str) -> None:
    """Plot the tables in ``folder`` as one figure at ``path`` (PNG, SVG or PDF by its suffix)."""
    steps = pd.read_csv(Path(folder) / "steps.csv")
    file = Path(folder) / "variance.csv"
    variance = pd.read_csv(file) if file.exists() else None
    names = list(dict.fromkeys(steps["candidate"]))
    figure = Figure(figsize=(8, 0.35 * len(names) + (4 if variance is not None else 1.2)), layout="constrained")
    panels = figure.subplots(2 if variance is not None else 1, 1, squeeze=False)[:, 0]
    for number, (arch, group) in enumerate(steps.groupby("arch", sort=False)):
        rows = [names.index(name) + 0.15 * number for name in group["candidate"]]
        errors = [group["ratio"] - group["least"], group["greatest"] - group["ratio"]]
        color = PALETTE[number % len(PALETTE)]
        panels[0].errorbar(group["ratio"], rows, xerr=errors, fmt="o", ms=4, color=color, label=arch)
    precision = ", ".join(dict.fromkeys(steps["precision"].astype(str)))
    panels[0].axvline(1, color="0.7", lw=1)
    panels[0].set(
        xscale="log", xlabel="time of a step / deterministic step", title=f"training step, precision {precision}"
    )
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False)
    if variance is not None:
        for number, (key, text) in enumerate((("loc", "loc"), ("log_scale", "log-scale"))):
            panels[1].plot(variance["ms"], variance[f"{key}_ratio"], "o", color=PALETTE[number], label=text)
        for _, row in variance.iterrows():
            panels[1].annotate(row["candidate"], (row["ms"], row["loc_ratio"]), fontsize=7)
        panels[1].set(
            xscale="log", yscale="log", xlabel="milliseconds of a gradient", ylabel="variance / one weight sample's",
            title=f"gradient at a trained state of {variance['arch'][0]}, batch {variance['batch'][0]}",
        )  # fmt: skip
        panels[1].legend(frameon=False)
    save(figure, Path(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m plots.speed", description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/speed", help="output folder of experiments.benchmarks.steps")
    parser.add_argument("-o", "--output", default="speed.png", help="file to write")
    arguments = parser.parse_args()
    plot(arguments.folder, arguments.output)
