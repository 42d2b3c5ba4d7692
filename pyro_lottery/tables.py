"""Tables of many runs, for figures and statistics over seeds, networks and scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_lottery import masks
from pyro_lottery.errors import UserError
from pyro_lottery.runs.loaded import Run, check_levels, load_run
from pyro_lottery.runs.manifest import COLUMNS

OPTIONS = ("arch", "guide", "score", "rewind", "lr", "warmup_epochs", "train_samples", "seed")
"""The options that distinguish the runs of a study."""


def list_runs(root: str | Path) -> list[Run]:
    """All runs of ``python -m pyro_lottery.imp`` in ``root``, sorted by name, without controls and transplants.

    Raises ``UserError`` if ``root`` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name one that contains run folders")
    found = [load_run(path.parent) for path in sorted(root.glob("*/config.json"))]
    return [run for run in found if not run.folder.origin]


def with_derived(run: Run) -> Iterator[tuple[str, Run]]:
    """``(treatment, run)`` of the run itself, ``imp``, and of its controls and transplant, each under its name."""
    yield "imp", run
    for path in sorted(run.folder.path.glob("controls/*/config.json")):
        yield path.parent.name, load_run(path.parent)
    if (run.folder.path / "transplant" / "config.json").exists():
        yield "transplant", load_run(run.folder.path / "transplant")


def levels(runs: list[Run]) -> pd.DataFrame:
    """A table with one row per finished level of ``runs``, their controls and their transplants.

    Its columns are the run's path, the treatment (``imp``, ``reinit``, ..., ``transplant``), the options in ``OPTIONS`` and
    the columns of ``results.csv``.
    """
    rows = [
        _key(treatment, derived) | asdict(row)
        for run in runs
        for treatment, derived in with_derived(run)
        for row in derived.folder.results()
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run", "treatment", *OPTIONS, *COLUMNS])


def layers(runs: list[Run], level: int | None = None) -> pd.DataFrame:
    """A table with one row per prunable layer of ``runs`` at ``level``, by default each run's last finished level.

    Its columns are the depth (1 for the layer next to the input), the number of weights, the density and the sparsity,
    beside those that identify the run. Raises ``UserError`` if ``level`` is not finished.
    """
    rows = []
    for run in runs:
        chosen = run.folder.finished()[-1].level if level is None else check_levels(run, [level])[0]
        mask = run.folder.mask(chosen)
        for depth, (site, density) in enumerate(masks.density_per_site(mask).items(), start=1):
            where = {"level": chosen, "site": site, "depth": depth, "weights": mask[site].numel()}
            rows.append(_key("imp", run) | where | {"density": density, "sparsity": 1 - density})
    return pd.DataFrame(rows)


def _key(treatment: str, run: Run) -> dict[str, Any]:
    return {"run": str(run.folder.path), "treatment": treatment} | {n: getattr(run.config, n) for n in OPTIONS}
