"""The figures of a run folder: of its finished levels and of its evaluation."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_lottery import data, files, masks, metrics
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.types import LevelResult

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can distinguish."""


def percent_axis(axes: Axes, lowest: float) -> None:
    """Set the x axis to the % of weights remaining: logarithmic, from 100 down to ``lowest``."""
    axes.set(xscale="log", xlabel="weights remaining (%)")
    known: tuple[float, ...] = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1)
    if lowest > 10:
        known = (100, 80, 70, 60, 50) if lowest > 50 else (100, 70, 50, 30, 20, 10)
    ticks = [t for t in known if t >= lowest * 0.85]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(115, lowest * 0.85)


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of the suffix of ``path``; equal figures give equal files."""
    written = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(written, format=path.suffix[1:], dpi=150, metadata=metadata)
    files.write_atomic(path, written.getvalue())


def plot_run(run: RunFolder) -> list[Path]:
    """Write the figures of the finished levels into the run folder and return their paths.

    ``accuracy.png`` has test accuracy and MACE against the % of weights remaining, for a regression ``rmse.png`` has RMSE and
    coverage; ``layers.png`` has the density per layer.
    """
    rows = run.results()
    title = f"{_what(run)}, score {run.config['score']}"
    if run.origin:
        title += f"\n{run.origin}: {run.config[run.origin]}".replace("$", r"\$")
    # Margins by hand: a layout engine takes as long as the drawing, and every stop of a run draws.
    figure = Figure(figsize=(6, 5))
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.1, top=0.89, hspace=0.08)
    top, bottom = figure.subplots(2, 1, sharex=True)
    first = "rmse" if rows[0].is_regression else "accuracy"
    accuracy(top, rows)
    top.set(title=title, xlabel="")
    if rows[0].is_regression:
        coverage(bottom, rows)
    else:
        maces = [row.mace or 0.0 for row in rows]
        bottom.plot([100 * row.density for row in rows], maces, "o-", color=PALETTE[2])
        bottom.set(ylabel="MACE", ylim=(0, 1.1 * max(maces)))
        percent_axis(bottom, 100 * min(row.density for row in rows))
    save(figure, run.figure(first))
    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.13, top=0.8)
    axes = figure.subplots()
    layers(axes, run)
    axes.set_title(f"{title}\ndensity per layer, level {rows[0].level} (light) to {rows[-1].level} (black)")
    save(figure, run.figure("layers"))
    return [run.figure(first), run.figure("layers")]


def accuracy(axes: Axes, rows: Sequence[LevelResult]) -> None:
    """Plot test accuracy against the % of weights remaining: at the end, the maximum over epochs, and of the dense level.

    For a regression, plots the RMSE at the end.
    """
    percent, ends = [100 * row.density for row in rows], [test_score(row) for row in rows]
    if not rows[0].is_regression:
        most = [100 * (row.max_test_accuracy or 0.0) for row in rows]
        axes.plot(percent, most, "o-", color=PALETTE[0], label="maximum over epochs")
    axes.plot(percent, ends, "s--", color=PALETTE[1], label="at the end")
    if rows[0].level == 0 and rows[0].density == 1:
        axes.axhline(ends[0], color="0.6", ls=":", label="dense, at the end")
    axes.set_ylabel(score_label(rows))
    axes.legend(frameon=False)
    percent_axis(axes, min(percent))


def cost(axes: Axes, rows: Sequence[LevelResult]) -> None:
    """Plot the time of a training step and, on a second axis, :func:`test_score`, against the % of weights remaining."""
    percent = [100 * row.density for row in rows]
    (time,) = axes.plot(percent, [row.step_ms for row in rows], "o-", color=PALETTE[3], label="time per step")
    axes.set(ylabel="milliseconds per step", ylim=(0, None))
    other = axes.twinx()
    (score,) = other.plot(percent, [test_score(row) for row in rows], "s--", color=PALETTE[0], label=score_label(rows))
    other.set_ylabel(score_label(rows))
    axes.legend(handles=[time, score], frameon=False)
    percent_axis(axes, min(percent))


def test_score(row: LevelResult) -> float:
    """Test accuracy at a level's end in %; for a regression, the RMSE, NaN for a likelihood without a mean."""
    if row.test_accuracy is not None:
        return 100 * row.test_accuracy
    return math.nan if row.rmse is None else row.rmse


def score_label(rows: Sequence[LevelResult]) -> str:
    """The label of an axis with :func:`test_score`."""
    return "test RMSE" if rows[0].is_regression else "test accuracy (%)"


def coverage(axes: Axes, rows: Sequence[LevelResult]) -> None:
    """Plot the % of test targets in central predictive intervals of 50, 80 and 95 % against the % of weights remaining."""
    percent = [100 * row.density for row in rows]
    for look, level in enumerate(metrics.LEVELS):
        found = [100 * getattr(row, f"coverage_{level}") for row in rows]
        axes.plot(percent, found, "o-", color=PALETTE[look], label=f"{level} % interval")
        axes.axhline(level, color=PALETTE[look], ls=":")
    axes.set(ylabel="targets inside (%)", ylim=(0, 105))
    axes.legend(frameon=False)
    percent_axis(axes, min(percent))


def layers(axes: Axes, run: RunFolder) -> None:
    """Plot the density per layer, one line per finished level of ``run``; later levels are darker."""
    rows = run.finished()
    for row in rows:
        density = masks.density_per_site(run.mask(row.level))
        shade = str(0.75 * (1 - row.level / max(1, rows[-1].level)))
        axes.plot(range(1, len(density) + 1), [100 * d for d in density.values()], ".-", color=shade, lw=1)
    axes.set(xlabel="layer (from the input)", ylabel="weights remaining (%)", ylim=(0, 105))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_evaluation(run: RunFolder, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Write ``evaluation/NAME.png`` for each table of :func:`pyro_lottery.evaluate.evaluate` and return their paths."""

    def reliability(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
        axes.plot([0, 1], [0, 1], color="0.7", lw=1)
        _by(axes, rows, "level", "confidence", "accuracy")

    def entropies(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
        for look, column in enumerate(("total", "aleatoric", "epistemic")):
            _line(axes, rows, "density", column, look, label=f"{column} entropy (nats)")

    def classes(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
        _by(axes, rows, "level", "label", "accuracy")
        last = _last(rows)
        if len(last) <= 30:  # more names would overlap
            names = [str(row["class"])[:20].replace("$", r"\$") for row in last]
            axes.set_xticks([row["label"] for row in last], names, rotation=90)
        axes.set_xlabel("class")

    plots = {
        "uncertainty": entropies,
        "classes": classes,
        "samples": lambda axes, rows: _by(axes, rows, "level", "samples", "nll"),
        "selective": lambda axes, rows: _by(axes, rows, "level", "coverage", "accuracy"),
        "reliability": reliability,
        "ood": lambda axes, rows: _by(axes, [r for r in rows if r["score"] == "total"], "ood", "density", "auroc"),
        "histogram": lambda axes, rows: _by(axes, _last(rows), "images", "entropy", "share", drawstyle="steps-mid"),
        "corruptions": lambda axes, rows: _by(axes, _last(rows), "corruption", "severity", "accuracy"),
    }
    titles = {
        "uncertainty": "entropy of the predictive", "classes": "accuracy by class and level",
        "samples": "NLL against posterior samples, by level",
        "selective": "accuracy on the most confident images, by level",
        "ood": "AUROC of other images, by total entropy", "corruptions": "accuracy on corrupted images, last level",
        "reliability": "accuracy against confidence, by level",
        "histogram": "total entropy (nats) of test and other images, last level",
    }  # fmt: skip
    paths = []
    for name, rows in tables.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        plots[name](axes, rows)
        if name in ("uncertainty", "ood"):
            percent_axis(axes, 100 * min(row["density"] for row in rows))
        axes.legend(frameon=False, fontsize=8)
        draws = max(
            int(row["num_samples"]) for row in rows if row["num_samples"] == row["num_samples"]
        )  # NaN for a baseline
        axes.set_title(f"{_what(run)}\n{titles[name]}, {draws} draw{'s' * (draws != 1)}", fontsize=9)
        save(figure, run.evaluation_figure(name))
        paths.append(run.evaluation_figure(name))
    return paths


def _what(run: RunFolder) -> str:
    config = run.config
    name = data.title(config["dataset"], config["data_dir"], config.get("image_size"))
    what = f"{config['arch']}, {name}, {config['guide']}"
    return what.replace("$", r"\$")  # matplotlib would read $ as the start of a formula


def _by(axes: Axes, rows: Sequence[Mapping[str, Any]], group: str, x: str, y: str, **style: Any) -> None:
    for look, value in enumerate(dict.fromkeys(row[group] for row in rows)):
        chosen = [row for row in rows if row[group] == value]
        _line(axes, chosen, x, y, look, label=f"{group} {value}", **style)
    axes.set(xlabel=x, ylabel=y)


def _last(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["level"] == rows[-1]["level"]]


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, look: int, **style: Any) -> None:
    scale = 100 if x == "density" else 1
    color = PALETTE[look % len(PALETTE)]
    axes.plot([scale * row[x] for row in rows], [row[y] for row in rows], ".-", color=color, **style)
