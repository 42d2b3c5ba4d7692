"""What all figures share: lines with bands over seeds, a look per kind of ticket, titles, and the files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.study.finished import ACCURACIES, Finished
from pyro_lottery import files
from pyro_lottery.errors import UserError
from pyro_lottery.runs.figures import PALETTE, percent_axis, save

MARKERS = "osD^vP*"


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a panel: rows of ``Finished.levels``, and the index of its look in the palette."""

    label: str
    frame: pd.DataFrame
    look: int
    dense: bool = True
    """Whether a dashed line shows its dense level."""


@dataclass(frozen=True, eq=False)
class Panels:
    """A row of panels, one per network: the column and label of the y axis, and a function from a network's levels to lines."""

    column: str
    ylabel: str
    lines: Callable[[pd.DataFrame], Sequence[Line]]


def accuracies(finished: Finished, lines: Callable[[pd.DataFrame], Sequence[Line]], name: str = "") -> Panels:
    """A row of panels of the accuracy that ``finished`` shows; ``name`` is a first line of its label."""
    label = ACCURACIES[finished.accuracy]
    return Panels("accuracy", f"{name}\n{label}" if name else label, lines)


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure and the numbers in it."""

    figure: Figure
    table: pd.DataFrame

    def save(self, stem: str, folder: Path) -> list[Path]:
        """Write ``STEM.png``, ``STEM.svg`` and ``STEM.csv``; equal runs give equal files."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}{suffix}" for suffix in (".png", ".svg", ".csv")]
        with matplotlib.rc_context({"svg.hashsalt": stem}):
            for path in paths[:2]:
                save(self.figure, path)
        files.write_atomic(paths[2], self.table.to_csv(index=False, float_format="%.6g").encode())
        return paths


def over_seeds(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of ``column`` per level; raises ``UserError`` if a seed has two runs."""
    if len(twice := frame[frame.duplicated(["level", "seed"], keep=False)]):
        raise UserError(
            f"two runs of seed {twice['seed'].iloc[0]} would be one line: {', '.join(sorted(set(twice['run']))[:2])}"
        )
    grouped = frame.groupby("level")
    found = pd.DataFrame({"percent": grouped["percent"].mean(), "mean": grouped[column].mean()})
    return found.assign(std=grouped[column].std(ddof=1), seeds=grouped["seed"].nunique()).reset_index()


def plot_line(axes: Axes, line: Line, column: str) -> pd.DataFrame:
    """Mean line, band of one standard deviation over seeds, and the dense level as a dashed line."""
    color, points = PALETTE[line.look % len(PALETTE)], over_seeds(line.frame, column)
    axes.plot(points["percent"], points["mean"], MARKERS[line.look % 7] + "-", color=color, ms=4, label=line.label)
    spread = points.dropna()
    axes.fill_between(
        spread["percent"], spread["mean"] - spread["std"], spread["mean"] + spread["std"], color=color, alpha=0.18, lw=0
    )
    if line.dense and (points["level"] == 0).any():
        axes.axhline(points["mean"][points["level"] == 0].iloc[0], color=color, ls="--", lw=0.8, alpha=0.8)
    return points.assign(series=line.label)


def curves(finished: Finished, headline: str, rows: Sequence[Panels], levels: pd.DataFrame | None = None) -> Plot:
    """A grid of panels of curves against the % of weights remaining: a column per network, a row per ``rows``."""
    levels = finished.levels if levels is None else levels
    columns = {arch: levels[levels["arch"] == arch] for arch in finished.archs}
    shown = {a: f for a, f in columns.items() if any(len(line.frame) for row in rows for line in row.lines(f))}
    if not shown:
        raise UserError("none of its runs is finished")
    return grid(finished, headline, rows, shown)


def grid(finished: Finished, headline: str, rows: Sequence[Panels], columns: dict[str, pd.DataFrame]) -> Plot:
    """A grid of panels as in ``curves``, with a column per name in ``columns``."""
    figure = Figure(figsize=(max(6.4, 4.2 * len(columns)), 1.2 + 3.0 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col")
    tables = []
    for place, (name, frame) in enumerate(columns.items()):
        for axes, row in zip(panels[:, place], rows, strict=True):
            shown = [line for line in row.lines(frame) if len(line.frame)]
            for line in shown:
                tables.append(plot_line(axes, line, row.column).assign(network=name, quantity=row.ylabel))
            axes.set_ylabel(row.ylabel)
            axes.grid(alpha=0.25, lw=0.5)
            if shown:
                axes.legend(frameon=False, fontsize=8)
        panels[0, place].set_title(name)
        percent_axis(panels[-1, place], frame["percent"].min())
    order = ["network", "quantity", "series", "level", "percent", "mean", "std", "seeds"]
    table = pd.concat(tables, ignore_index=True)[order]
    dashed = any(line.get_linestyle() == "--" for axes in panels.flat for line in axes.lines)
    note = "mean; band: ± one standard deviation" + ("; dashed: dense" if dashed else "")
    shown = replace(finished, only=tuple(pd.concat(columns.values())["arch"].unique()))
    finish(figure, shown, headline, note, table["seeds"])
    return Plot(figure, table)


def finish(figure: Figure, finished: Finished, headline: str, note: str, seeds: Iterable[int]) -> None:
    """Set the title, wrapped to the figure's width: the headline; data set, protocol and number of seeds; and how to read
    the figure.
    """
    least, most = min(seeds), max(seeds)
    count = f"seeds: {least}" if least == most else f"seeds: {least} to {most}"
    width = int(13.5 * figure.get_figwidth())  # characters of this size
    parts = (headline, f"{finished.description}, {count}", note)
    lines = [line for part in parts for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(lines), fontsize=9)
