"""Question: which way to a sparse Bayesian network gives most for its training?

Every method has the same number of epochs in all. Iterative pruning divides them among its trainings, one-shot pruning between two, and
schedules spend them on one. ``dense`` is the network without pruning, whose training the scores of the initial weights do not need.
With ``--equal-seconds TABLE`` every method trains as long as the first one did in an earlier table of equal epochs.
Methods are compared with the first by pairs of seeds. Beside the test images they see corrupted ones (each kind at severity 3, and the mean
over kinds) and images with permuted pixels, which the entropy is to detect. Writes ``OUT/methods_seeds.csv``, a row per method,
density and seed, their means ``methods.csv`` and ``methods.md``, and a figure.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.study.executors import here
from experiments.study.jobs import Imp, share_level_0
from experiments.study.markdown import markdown_table
from experiments.study.statistics import interval
from plots.methods import plot
from pyro_lottery import data, files, metrics
from pyro_lottery.data import Split, in_memory
from pyro_lottery.errors import Failed, UserError
from pyro_lottery.prediction import Predictive
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.loaded import Level, load_run
from pyro_lottery.types import Ticket, posterior_checksum

PRUNINGS = 4
"""Prunings of an iterative method."""
METRICS = ("accuracy", "nll", "brier", "ece", "smooth_ece", "shift_nll", "ood_auroc")
OWN = METRICS[4:]
"""Metrics that a run does not measure itself."""
SEVERITY = 3
SHIFTED = 500
"""Test images, at most, that are corrupted or permuted."""


@dataclass(frozen=True)
class Method:
    """A way to a sparse network: options of ``python -m pyro_lottery.imp``, and which of its trainings it needs."""

    options: Mapping[str, Any] = field(default_factory=dict)
    trainings: int = PRUNINGS + 1
    """How many trainings share the epochs."""
    level: int = PRUNINGS
    """The level that is the result."""

    def config(self, density: float, epochs: int, **shared: Any) -> Config:
        """The run of this method at ``density`` with ``epochs`` in all; raises ``UserError`` if a training would have none."""
        each = epochs // self.trainings
        if each < 1:
            raise UserError(f"--epochs {epochs} gives none to each of {self.trainings} trainings; use more")
        milestones = {max(1, round(each * part)) for part in (0.6, 0.85)} - {each}
        density_of = {"prune_to": density} if self.level or "schedule" in self.options else {}
        own = {"levels": self.level, "epochs": each, "milestones": tuple(sorted(milestones)), **density_of}
        return Config(**shared | own | self.options)

    def counted(self) -> range:
        """The levels whose training this method needs."""
        return range(self.level + 1 - self.trainings, self.level + 1)


def _once(**options: Any) -> Method:
    """One pruning of a trained dense network."""
    return Method({"schedule": "one_shot", **options}, trainings=2, level=1)


def _before(score: str) -> Method:
    """One pruning of the initial weights, after which all epochs are left."""
    return Method({"schedule": "one_shot", "score": score}, trainings=1, level=1)


def _moving(schedule: str, **options: Any) -> Method:
    return Method({"schedule": schedule, **options}, trainings=1, level=0)


METHODS: dict[str, Method] = {
    "imp": Method(),
    "imp, magnitude": Method({"score": "magnitude"}),
    "imp, learning-rate rewinding": Method({"rewind": "lr"}),
    "imp, deterministic": Method({"guide": "deterministic"}),
    "one shot": _once(),
    "one shot, swag": _once(guide="swag"),
    "one shot, sgld": _once(guide="sgld"),
    "one shot, sghmc": _once(guide="sghmc"),
    "one shot, ivon": _once(guide="ivon"),
    "one shot, mc dropout": _once(guide="mc_dropout"),
    "one shot, laplace": _once(guide="laplace", prior="fan_in"),
    "one shot, deterministic": _once(guide="deterministic"),
    "snip": _before("snip"),
    "grasp": _before("grasp"),
    "synflow": _before("synflow"),
    "random": _before("random"),
    "gradual": _moving("gradual"),
    "gradual, deterministic": _moving("gradual", guide="deterministic"),
    "dynamic": _moving("dynamic"),
    "dynamic, deterministic (RigL)": _moving("dynamic", guide="deterministic"),
    "dense": Method(trainings=1, level=0),
}
"""Methods by name; the first is what the others are compared with. ``--add`` takes more."""


def row_of(name: str, method: Method, density: float, level: Level) -> dict[str, Any]:
    """What a finished method gives and costs: quality, epochs, seconds of training and bytes of the ticket's file."""
    run = level.run
    results = run.results.set_index("level")
    counted = results.loc[list(method.counted())]
    found = {n: results.loc[level.number, f"test_{n}" if n == "accuracy" else n] for n in METRICS if n not in OWN}
    found |= measured(level)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket.safetensors"
        Ticket(level.mask, level.posterior, level.load_model().model.net_state()).pack(path)
        size = path.stat().st_size
    return {
        "method": name, "wanted": density, "density": results.loc[level.number, "density"], "seed": run.config.seed, **found,
        "epochs": run.config.epochs * len(counted), "seconds": counted["train_seconds"].sum(), "bytes": size,
    }  # fmt: skip


def measured(level: Level) -> dict[str, float]:
    """The metrics ``OWN`` of a level, which are kept in its run folder."""
    path, own = (
        level.run.folder.path / "evaluation" / f"methods_{level.number}.json",
        posterior_checksum(level.posterior),
    )
    if path.exists() and (kept := json.loads(path.read_text()))["posterior"] == own:
        return {name: kept[name] for name in OWN}
    network, config, test = level.load_model(), level.run.config, in_memory(level.run.load_data().test)
    few = replace(test, inputs=test.inputs[:SHIFTED], targets=test.targets[:SHIFTED])

    def predict(images: Split) -> Predictive:
        return network.predictive(images, config.eval_samples, config.seed)

    whole, inside = predict(test), predict(few)
    outside = predict(data.out_of_distribution(few, "permuted", config.data_dir))
    shifted = [metrics.nll(predict(data.corrupt(few, kind, SEVERITY)).probs, few.labels) for kind in data.CORRUPTIONS]
    found = {
        "smooth_ece": metrics.smooth_ece(whole.probs, test.labels),
        "shift_nll": sum(shifted) / len(shifted),
        "ood_auroc": metrics.auroc(inside.total, outside.total),
    }
    path.parent.mkdir(exist_ok=True)
    files.write_json(path, found | {"posterior": own})
    return found


def of_equal_seconds(table: pd.DataFrame, methods: Mapping[str, Method]) -> dict[tuple[str, float], int]:
    """Epochs by method and density with which each trains as long as the first of ``methods``; ``table`` has rows of :func:`row_of`.

    They are a multiple of the method's trainings, and at least one each. Raises ``UserError`` if a method is not in the table.
    """
    seconds = table.groupby(["method", "wanted"])[["seconds", "epochs"]].sum()
    if missing := sorted(set(methods) - set(table["method"])):
        raise UserError(
            f"--equal-seconds: the table has no {', '.join(missing)}; give methods_seeds.csv of the same methods"
        )
    runs = table.groupby(["method", "wanted"]).size()
    first, found = next(iter(methods)), {}
    for (name, density), row in seconds.loc[list(methods)].iterrows():  # type: ignore[misc]
        target = seconds.loc[(first, density), "seconds"] / runs[(first, density)]
        trainings = methods[name].trainings
        found[(name, density)] = trainings * max(1, round(target * row["epochs"] / row["seconds"] / trainings))
    return found


def compared(table: pd.DataFrame, first: str) -> pd.DataFrame:
    """A row per density and method: means over seeds, and the 95 % interval of the difference of NLL to ``first``, by pairs of seeds."""
    rows = []
    for (density, name), found in table.groupby(["wanted", "method"], sort=False):
        own = found.set_index("seed")
        base = table[(table["wanted"] == density) & (table["method"] == first)].set_index("seed")
        pairs = (own["nll"] - base["nll"]).dropna()
        low, high = interval(pairs)
        means = {n: own[n].mean() for n in (*METRICS, "epochs", "seconds", "bytes")}
        rows.append({"wanted": density, "method": name, "seeds": len(own), **means, "nll_low": low, "nll_high": high})
    return pd.DataFrame(rows)


def markdown(means: pd.DataFrame, title: str, first: str) -> str:
    """The table of :func:`compared` as a page."""
    head = (
        "method", "accuracy", "NLL", f"NLL − that of {first}", "Brier", "ECE", "SmoothECE", "NLL, corrupted", "AUROC, permuted",
        "epochs", "seconds", "kB",
    )  # fmt: skip
    lines = [f"# {title}", ""]
    for density, rows in means.groupby("wanted", sort=False):
        cells = [
            (
                row.method, f"{row.accuracy:.1%}", f"{row.nll:.3f}", f"{row.nll_low:+.3f} to {row.nll_high:+.3f}", f"{row.brier:.3f}",
                f"{row.ece:.3f}", f"{row.smooth_ece:.3f}", f"{row.shift_nll:.3f}", f"{row.ood_auroc:.3f}", f"{row.epochs:.0f}",
                f"{row.seconds:.0f}", f"{row.bytes / 1000:.0f}",
            )
            for row in rows.itertuples()
        ]  # fmt: skip
        lines += [f"## {100 * float(density):g} % of the weights", "", *markdown_table(head, cells), ""]  # type: ignore[arg-type]
    return "\n".join(lines)


def read_table(path: Path, densities: Sequence[float]) -> pd.DataFrame:
    """The rows of ``methods_seeds.csv`` at ``densities``; raises ``UserError`` if it is no such table or lacks one of them."""
    try:
        table = pd.read_csv(path)
        found = table[table["wanted"].isin(densities)]
        assert {"method", "seconds", "epochs"} <= set(table)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"--equal-seconds {path}: expected methods_seeds.csv of this command ({error})") from error
    if missing := sorted(set(densities) - set(found["wanted"])):
        raise UserError(f"--equal-seconds {path}: it has no density of {', '.join(map(str, missing))}")
    return found


def methods_of(names: Iterable[str] | None, more: str | None) -> dict[str, Method]:
    """The methods to run: those of ``names``, or all, with those of ``more``, which is ``package.module:NAME`` of such a dict."""
    known = dict(METHODS)
    if more is not None:
        module, _, attribute = more.partition(":")
        try:
            known |= getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(f"--add {more}: expected package.module:NAME of a dict of methods ({error})") from error
    for name in names or ():
        if name not in known:
            raise UserError(f"--methods {name!r}: unknown; choose among {', '.join(known)}")
    return {name: known[name] for name in (names or known)}


def parser() -> Parser:
    """The command line."""
    parser = Parser("python -m experiments.methods", str(__doc__))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.05, 0.012])
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each method in all (default: 40)")
    parser.add_argument(
        "--equal-seconds",
        type=Path,
        metavar="TABLE",
        help="methods_seeds.csv of equal epochs, whose seconds set the epochs of each method",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    parser.add_argument("--methods", nargs="+", help="their names; default: all")
    parser.add_argument("--add", help="more methods: package.module:NAME of a dict like METHODS")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/methods"), help="folder of all runs (default: runs/methods)"
    )
    parser.add_argument("-o", "--out", type=Path, help="folder of tables and figures; default: --runs")
    shared = (
        "arch",
        "patch_size",
        "dataset",
        "data_dir",
        "image_size",
        "train_size",
        "test_size",
        "batch_size",
        "lr",
        "eval_samples",
    )
    parser.add_options(only=(*shared, "device", "precision"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = vars(parser().parse_args(arguments))
    return run_command("python -m experiments.methods", lambda: work(**given), arguments)


def work(
    densities: list[float],
    epochs: int,
    equal_seconds: Path | None,
    seeds: int,
    methods: list[str] | None,
    add: str | None,
    runs: Path,
    out: Path | None,
    **shared: Any,
) -> None:
    """Train what is not finished, seed by seed, and write tables and figure after every seed; code that methods name is this command's own."""
    chosen = methods_of(methods, add)
    out, first = out or runs, next(iter(chosen))
    epochs_of: Mapping[tuple[str, float], int] = {}
    if equal_seconds is not None:
        epochs_of = of_equal_seconds(read_table(equal_seconds, densities), chosen)
    jobs: dict[tuple[str, float, int], Imp] = {
        (name, density, seed): Imp(method.config(density, epochs_of.get((name, density), epochs), seed=seed, **shared))
        for seed in range(seeds)
        for density in densities
        for name, method in chosen.items()
    }
    for seed in range(seeds):
        ours = {key: job for key, job in jobs.items() if key[2] == seed}
        failed = here.carry_out(share_level_0(ours.values()), runs)
        rows = [
            row_of(
                name, chosen[name], density, load_run(job.folder(runs).path, trust_code=True).level(chosen[name].level)
            )
            for (name, density, number), job in jobs.items()
            if number <= seed and job not in failed
        ]
        table = pd.DataFrame(rows)
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / "methods_seeds.csv", index=False)
        config = next(iter(jobs.values())).config
        budget = f"{epochs} epochs in all" if equal_seconds is None else f"as long as {first}"
        title = f"{config.arch}, {config.data_name}, {budget}, {seed + 1} seed{'s' if seed else ''}"
        means = compared(table, first)
        (out / "methods.md").write_text(markdown(means, title, first))
        plot(means, title).save("methods", out)
        if failed:
            raise Failed("; ".join(f"{job}: {error}" for job, error in failed.items()))
    print(f"tables and figure: {out}")


if __name__ == "__main__":
    sys.exit(main())
