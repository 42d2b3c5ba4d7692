"""Writes a self-contained page about runs: ``python -m pyro_lottery.report RUN [RUN ...] -o report.html``.

The page shows each run's config, results as sortable tables, vector figures, layer densities, calibration, and the command
that trains it again. Text from files is escaped, and the page runs no script except its own.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_lottery import data, files, metrics, plot
from pyro_lottery.errors import UserError
from pyro_lottery.runs import figures
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import RESUMABLE, WITHOUT_SCALE, Config, of_transplants
from pyro_lottery.runs.figures import PALETTE
from pyro_lottery.runs.loaded import Run, load_run
from pyro_lottery.runs.trained import named_code

PROG = "python -m pyro_lottery.report"
BYTES = 8
"""Bytes per surviving weight of a Bayesian network, for loc and scale in float32; a deterministic network needs half."""
Column = tuple[str, Callable[[Any], Any], str]
COLUMNS: tuple[Column, ...] = (
    ("level", lambda row: row.level, "d"),
    ("density %", lambda row: 100 * row.density, ".2f"),
    ("non-zero", lambda row: row.remaining, ",d"),
    ("dense", lambda row: row.total, ",d"),
    ("KiB", lambda row: row.remaining * BYTES / 1024, ",.1f"),
    ("accuracy %", lambda row: _percent(row.test_accuracy), ".2f"),
    ("max %", lambda row: _percent(row.max_test_accuracy), ".2f"),
    ("RMSE", lambda row: row.rmse, ".4g"),
    ("NLL", lambda row: row.nll, ".4f"),
    ("MACE", lambda row: row.mace, ".4f"),
    ("ECE", lambda row: row.ece, ".4f"),
    ("Brier", lambda row: row.brier, ".4f"),
    *((f"in {n} %", lambda row, n=n: _percent(getattr(row, f"coverage_{n}")), ".1f") for n in metrics.LEVELS),
    ("seconds", lambda row: row.train_seconds, ".0f"),
    ("ms/step", lambda row: row.step_ms, ".1f"),
    ("ms/prediction", lambda row: row.predict_ms, ".3f"),
    ("MFLOP", lambda row: None if row.flops is None else row.flops / 1e6, ",.2f"),
)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const value = row => Number(row.cells[column].dataset.value);
      [...body.rows].sort((a, b) => (up ? 1 : -1) * (value(a) - value(b))).forEach(row => body.append(row));
    });
  });
}
"""


def report(runs: Sequence[Run], title: str = "pyro_lottery report") -> str:
    """The page about ``runs`` as HTML text."""
    environment = Environment(autoescape=True)
    template = environment.from_string(resources.files("pyro_lottery").joinpath("report.html").read_text("utf-8"))
    return template.render(
        title=title,
        written=datetime.date.today().isoformat(),
        runs=[_section(run) for run in runs],
        comparison=_comparison(runs),
        script=SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def _section(run: Run) -> dict[str, Any]:
    name, config = _name(run), run.config
    share = 0.5 if config.guide in WITHOUT_SCALE else 1
    rows = [run.row(row.level) for row in run.folder.finished()]
    columns = [column for column in COLUMNS if column[1](rows[0]) is not None]  # either accuracy or RMSE is None
    cells = [
        [{"value": value, "text": format(value, form)} for value, form in _values(row, columns, share)] for row in rows
    ]
    real = rows[0].is_regression
    score, calibration = (
        ("RMSE", "Share of test targets inside predictive intervals.") if real else ("accuracy", "Calibration errors.")
    )
    plots = [
        (f"Test {score} against the percentage of weights remaining.", lambda axes: plot.accuracy(run, axes)),
        (calibration, lambda axes: plot.calibration(run, axes)),
        (
            "Density of each layer, from the first level (light) to the last (black).",
            lambda axes: plot.layers(run, axes),
        ),
        (f"Time of a training step, and test {score}.", lambda axes: plot.cost(run, axes)),
    ]
    names = run.classes or ()
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    classes = f"; {len(names)} classes: {', '.join(names[:20])}{more}" if names else ""
    origin = f", {run.folder.origin}: {run.folder.config[run.folder.origin]}" if run.folder.origin else ""
    return {
        "name": name,
        "summary": f"{config.arch} on {config.data_name}, guide {config.guide}, score {config.score}, seed {config.seed}{origin}{classes}",
        "columns": [name for name, _, _ in columns],
        "rows": cells,
        "figures": [
            {"svg": _svg(f"{name}{place}", plot_on, (5.2, 3.6)), "caption": caption}
            for place, (caption, plot_on) in enumerate(plots)
        ],
        "command": command(run),
        "config": [
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in run.folder.config.items()
        ],
    }


def _values(row: Any, columns: Sequence[Column], share: float) -> list[tuple[Any, str]]:
    return [((share if name == "KiB" else 1) * value(row), form) for name, value, form in columns]


def _name(run: Run) -> str:
    """The folder's name; for a control or transplant, with the name of its run."""
    path = run.folder.path.resolve()
    depth = {"controls": 3, "transplant": 2}.get("controls" if path.parent.name == "controls" else path.name, 1)
    return "/".join(path.parts[-depth:])


def command(run: Run) -> str:
    """The shell command that trains a run again, or an empty string if there is none.

    There is none for a run that was started in Python, nor for a transplant of a file, of which only a checksum is kept.
    """
    if run.config.dataset == data.OWN:
        return ""
    path = run.folder.path
    levels = [str(row.level) for row in run.folder.results()]
    if run.folder.origin == "control":
        source = ["controls", str(path.parent.parent), "--control", run.folder.config["control"]]
        own = ["--trust-code"] if named_code(run.config) else []
        return shlex.join(["python", "-m", "pyro_lottery." + source[0], *source[1:], "--levels", *levels, *own])
    if run.folder.origin:
        at_home = path.name == "transplant" and (path.parent / "config.json").exists()
        if not at_home:
            return ""
        usual = of_transplants(load_run(path.parent).config, str(path))
        own = [*_differing(run.config, usual, RESUMABLE), *(["--trust-code"] if named_code(run.config) else [])]
        return shlex.join(["python", "-m", "pyro_lottery.transplant", str(path.parent), "--levels", *levels, *own])
    moved = path.resolve() != Path(str(run.config.run_dir)).resolve()
    return training_command(replace(run.config, run_dir=str(path)) if moved else run.config)


def training_command(config: Config) -> str:
    """The shell command that trains a run with ``config``.

    >>> training_command(Config(arch="lenet", epochs=3, milestones=(1, 2)))
    'python -m pyro_lottery.imp --arch lenet --epochs 3 --milestones 1 2 --run-dir runs/lenet-cifar10-mean_field-snr-seed0-epochs3-milestones1+2'
    """
    return shlex.join(["python", "-m", "pyro_lottery.imp", *_differing(config, Config(run_dir=""))])


def _differing(config: Config, usual: Config, without: Collection[str] = ()) -> list[str]:
    """The options of ``config`` that differ from those of ``usual``, as words of a command."""
    words = []
    for name, value in config.options().items():
        if value != getattr(usual, name) and name not in {"history_samples", *without}:
            many = value if isinstance(value, tuple | list) else (value,)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, many))]
    if config.history_samples != min(config.train_samples, config.eval_samples):
        words += ["--history-samples", str(config.history_samples)]
    return words


def _svg(salt: str, plot_on: Callable[[Axes], object], size: tuple[float, float]) -> str:
    figure = Figure(figsize=size, layout="constrained")
    plot_on(figure.subplots())
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _comparison(runs: Sequence[Run]) -> str:
    """Figures of all runs, as SVG: one of the classifiers and one of the regressions, whose scores have no common axis."""
    kinds: dict[bool, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.folder.finished()[0].is_regression, []).append(run)
    figures = (partial(_compare, runs=some) for some in kinds.values() if len(some) > 1)
    return "".join(_svg(f"comparison{place or ''}", figure, (9, 4.5)) for place, figure in enumerate(figures))


def _compare(axes: Axes, runs: Sequence[Run]) -> None:
    lowest = 100.0
    for look, run in enumerate(runs):
        rows = run.folder.finished()
        percent = [100 * row.density for row in rows]
        lowest = min(lowest, *percent)
        color = PALETTE[look % len(PALETTE)]
        label = _name(run).replace("$", r"\$")  # matplotlib would typeset a formula
        label = label.replace("_", "\u200b_", 1) if label.startswith("_") else label  # and would leave such a label out
        axes.plot(percent, [figures.test_score(row) for row in rows], "o-", ms=4, color=color, label=label[:60])
    axes.set_ylabel(figures.score_label(runs[0].folder.finished()))
    figures.percent_axis(axes, lowest)
    axes.legend(frameon=False, fontsize=7)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file to write")
    parser.add_argument("--title", default="pyro_lottery report", help="heading of the page")
    given = parser.parse_args(arguments)

    def work() -> None:
        page = report([load_run(path) for path in given.runs], given.title)
        if not given.output.parent.is_dir():
            raise UserError(
                f"-o {given.output}: folder {given.output.parent} does not exist; create it, or choose another"
            )
        if given.output.is_dir():
            raise UserError(f"-o {given.output} is a folder; name a file in it")
        try:
            files.write_atomic(given.output, page.encode())
        except OSError as error:
            if not files.is_refused(error):
                raise
            raise UserError(f"-o {str(given.output)[:200]}: {error.strerror}; choose another file") from error
        print(given.output)

    return run_command(PROG, work, arguments, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
