"""What a finished method gives and costs, and the comparison of methods by pairs of seeds."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import sleep
from typing import Any

import pandas as pd

from experiments.study.executors.worker import WAIT_SECONDS
from experiments.study.markdown import markdown_table
from experiments.study.methods import Method
from experiments.study.statistics import interval
from pyro_lottery import data, files, metrics
from pyro_lottery.data import Split, in_memory
from pyro_lottery.errors import Busy
from pyro_lottery.prediction import Predictive
from pyro_lottery.runs.loaded import Level, load_run
from pyro_lottery.types import Ticket, posterior_checksum

METRICS = ("accuracy", "nll", "brier", "ece", "smooth_ece", "shift_nll", "ood_auroc")
OWN = METRICS[4:]
"""Metrics that a run does not measure itself."""
SEVERITY = 3
SHIFTED = 500
"""Test images, at most, that are corrupted or permuted; of all classes, since test images may be sorted by class."""
WAY = 2
"""Counts up when a metric of ``OWN`` is measured in another way, so that what was kept is measured again."""


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


def measure_all(places: Iterable[tuple[Path, int]]) -> None:
    """Measure every level, of a run's folder and a number, once, together with the processes that do the same: what another one is measuring comes last."""
    waiting = list(dict.fromkeys(places))
    while waiting:
        later = []
        for path, number in waiting:
            try:
                measured(load_run(path, trust_code=True).level(number))
            except Busy:
                later.append((path, number))
        if len(later) == len(waiting):
            sleep(WAIT_SECONDS)
        waiting = later


def measured(level: Level) -> dict[str, float]:
    """The metrics ``OWN`` of a level, which are kept in its run folder; raises ``Busy`` while another process evaluates the run."""
    folder = level.run.folder.derived("evaluation")
    path, own = folder.path / f"methods_{level.number}.json", posterior_checksum(level.posterior)

    def missing() -> bool:
        kept = json.loads(path.read_text()) if path.exists() else {}
        return (kept.get("posterior"), kept.get("way")) != (own, WAY)

    if missing():
        with folder.lock():
            if missing():  # another process may have measured it just now
                files.write_json(path, _measure(level) | {"posterior": own, "way": WAY})
    kept = json.loads(path.read_text())
    return {name: kept[name] for name in OWN}


def some_of(test: Split) -> Split:
    """At most ``SHIFTED`` images, with the test set's share of each class."""
    return data.stratified_split(test, min(SHIFTED, len(test)), seed=0)[0]


def _measure(level: Level) -> dict[str, float]:
    network, config, test = level.load_model(), level.run.config, in_memory(level.run.load_data().test)
    few = some_of(test)

    def predict(images: Split) -> Predictive:
        return network.predictive(images, config.eval_samples, config.seed)

    whole, inside = predict(test), predict(few)
    outside = predict(data.out_of_distribution(few, "permuted", config.data_dir))
    shifted = [metrics.nll(predict(data.corrupt(few, kind, SEVERITY)).probs, few.labels) for kind in data.CORRUPTIONS]
    return {
        "smooth_ece": metrics.smooth_ece(whole.probs, test.labels),
        "shift_nll": sum(shifted) / len(shifted),
        "ood_auroc": metrics.auroc(inside.total, outside.total),
    }


def compared(table: pd.DataFrame, first: str) -> pd.DataFrame:
    """A row per density and method: means over seeds, the 95 % interval of the difference of NLL to ``first`` by pairs of seeds, and the median of the
    seconds, which other work on the machine lengthens for one seed or another.
    """
    rows = []
    for (density, name), found in table.groupby(["wanted", "method"], sort=False):
        own = found.set_index("seed")
        base = table[(table["wanted"] == density) & (table["method"] == first)].set_index("seed")
        pairs = (own["nll"] - base["nll"]).dropna()
        low, high = interval(pairs)
        means = {n: own[n].mean() for n in (*METRICS, "epochs", "bytes")} | {"seconds": own["seconds"].median()}
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
                row.method, f"{row.accuracy:.1%}", f"{row.nll:.3f}", f"{row.nll_low:+.3f} to {row.nll_high:+.3f}" if math.isfinite(row.nll_low) else "", f"{row.brier:.3f}",
                f"{row.ece:.3f}", f"{row.smooth_ece:.3f}", f"{row.shift_nll:.3f}", f"{row.ood_auroc:.3f}", f"{row.epochs:.0f}",
                f"{row.seconds:.0f}", f"{row.bytes / 1000:.0f}",
            )
            for row in rows.itertuples()
        ]  # fmt: skip
        lines += [f"## {100 * float(density):g} % of the weights", "", *markdown_table(head, cells), ""]  # type: ignore[arg-type]
    return "\n".join(lines)
