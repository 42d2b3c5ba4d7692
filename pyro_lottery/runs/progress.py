"""The progress of a run: a bar per level on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pyro_lottery.distributed import is_first
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.types import LevelResult

PLAIN_SECONDS = 10.0
"""Shortest time between two plain lines, so that logs stay short."""


def progress(console: Console | None = None, *more: ProgressColumn) -> Progress:
    """A progress bar with the time spent and left, and ``more`` columns; shows nothing without a terminal."""
    console = console or Console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, *more, console=console, disable=not console.is_terminal)


class LevelDisplay:
    """A context manager that shows the training of one level."""

    def __init__(
        self,
        level: int,
        levels: int,
        density: float,
        epochs: int,
        console: Console | None = None,
        end: float | None = None,
    ):
        """``end`` is the density to which a schedule prunes meanwhile."""
        self.console = console or Console(quiet=not is_first())
        to = "" if end is None or end >= density else f" to {100 * end:.3g}"
        self.title = f"level {level}/{levels}, density {100 * density:.3g}{to} %"
        self.epochs = epochs
        self._last = 0.0
        self._began: tuple[float, float] | None = None  # when, and at which epoch, progress was first seen
        self.bar = progress(self.console, TextColumn("{task.fields[state]}"))
        self.task = self.bar.add_task(self.title, total=epochs, state="")

    def __enter__(self) -> LevelDisplay:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, epochs_done: float, state: str, always: bool = False) -> None:
        """Show ``state`` after ``epochs_done`` epochs; ``always`` prints a plain line even within ``PLAIN_SECONDS`` of the last."""
        now = time.monotonic()
        when, first = self._began = self._began or (now, epochs_done)
        seconds = (now - when) / max(epochs_done - first, 1e-9) * (self.epochs - epochs_done)
        self.bar.update(self.task, completed=epochs_done, state=state)
        if not self.console.is_terminal and (always or now - self._last > PLAIN_SECONDS):
            self._last = now
            left = f", {seconds:.0f} s left" if epochs_done > first else ""
            if is_first():
                print(f"{self.title}: epoch {epochs_done:.4g}/{self.epochs}, {state}{left}", flush=True)


def results_table(rows: list[LevelResult]) -> Table:
    """The finished levels as a table for the terminal."""
    real = any(r.is_regression for r in rows)
    measured = ("rmse", "nll", "coverage 95 %") if real else ("accuracy %", "max %", "nll", "mace")
    names = ("level", "density %", "remaining", *measured, "seconds", "ms/step")
    table = Table(*names, box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for r in rows:
        table.add_row(
            str(r.level), f"{100 * r.density:.2f}", f"{r.remaining:,}", *_measured(r), f"{r.train_seconds:.0f}",
            f"{r.step_ms:.0f}",
        )  # fmt: skip
    return table


def _measured(r: LevelResult) -> list[str]:
    if r.is_regression:
        return ["" if r.rmse is None else f"{r.rmse:.4g}", f"{r.nll:.4f}", f"{100 * (r.coverage_95 or 0.0):.1f}"]
    accuracies = [f"{100 * (v or 0.0):.2f}" for v in (r.test_accuracy, r.max_test_accuracy)]
    return [*accuracies, f"{r.nll:.4f}", f"{r.mace:.4f}"]


def show_results(run: RunFolder) -> None:
    """Print the table of a run's finished levels and the path of its folder."""
    if not is_first():
        return
    Console().print(results_table(run.results()))
    print(f"results, tickets, posteriors and figures: {run.path}")
