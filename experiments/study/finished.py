"""The finished runs behind a figure: runs of one protocol on one data set, as tables, with the words for a title."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.study.protocols import FREE, LARGER, base_rate, describe, protocol_of
from pyro_lottery import tables
from pyro_lottery.errors import UserError
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.loaded import Run

GUIDES = {"mean_field": "Bayesian", "deterministic": "deterministic"}
"""The guides that the paper compares, and their names in figures and claims."""
ACCURACIES = {
    "test_accuracy": "test accuracy at the end (%)",
    "max_test_accuracy": "maximum test accuracy over epochs (%)",
}
"""The first involves no selection on test images; the second is the paper's."""


@dataclass(frozen=True, eq=False)
class Finished:
    """Runs that may be compared in one figure."""

    runs: list[Run]
    protocol: str
    accuracy: str = "test_accuracy"
    only: tuple[str, ...] = ()
    """The networks to show; none: all."""

    @cached_property
    def all_levels(self) -> pd.DataFrame:
        """The finished levels of all runs, controls and transplants; ``accuracy`` is in
        percent; ``base`` marks runs with the protocol's learning rate and no warm-up. Raises ``UserError`` for two copies
        of a run, since a copy is not another seed.
        """
        frame = tables.levels(self.runs)
        key = ["treatment", *tables.OPTIONS, "level"]
        for _, copies in frame[frame.duplicated(key, keep=False)].groupby(key):
            raise UserError(f"{' and '.join(copies['run'])} are the same run; keep one of them in the folder")
        rate = frame["lr"].mode()[0] if self.protocol == "custom" else base_rate(self.protocol)
        base = (frame["lr"] == rate) & (frame["warmup_epochs"] == 0)
        return frame.assign(accuracy=100 * frame[self.accuracy], percent=100 * frame["density"], base=base)

    @property
    def levels(self) -> pd.DataFrame:
        """The ``base`` rows of ``all_levels``, which all figures except figure 7 show."""
        return self.all_levels[self.all_levels["base"]]

    @cached_property
    def layers(self) -> pd.DataFrame:
        """``tables.layers`` of the runs pruned by snr and of the deterministic runs, per network at the last level that
        all of them have finished.
        """
        last = of_guides(self.levels).groupby(["arch", "run"])["level"].max()
        runs = {str(run.folder.path): run for run in self.runs}
        parts = [tables.layers([runs[run]], int(last[arch].min())) for arch, run in last.index]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["arch", "run"])

    @property
    def archs(self) -> list[str]:
        """The networks to show."""
        found = list(self.all_levels["arch"].unique())
        return [arch for arch in self.only if arch in found] or found

    @property
    def description(self) -> str:
        """Data set and protocol, so that a reduced figure is not mistaken for the paper's."""
        config = max((run.config for run in self.runs), key=lambda config: config.patch_size or 0)
        return f"{config.data_name}, {describe(config)}"


def treated(frame: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Rows with these options; by default those of IMP tickets rewound to their initial values."""
    for name, value in ({"treatment": "imp", "rewind": "init"} | options).items():
        frame = frame[frame[name] == value]
    return frame


def of_guide(frame: pd.DataFrame, guide: str = "mean_field", score: str = "snr", **options: Any) -> pd.DataFrame:
    """``treated`` rows of one guide and score; a deterministic network has no scales, so its score is the magnitude."""
    return treated(frame, guide=guide, score="magnitude" if guide == "deterministic" else score, **options)


def of_guides(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of Bayesian networks pruned by snr, and of deterministic ones."""
    return pd.concat([of_guide(frame, guide) for guide in GUIDES])


def read(
    root: Path,
    protocol: str | None = None,
    data: str | None = None,
    accuracy: str = "test_accuracy",
    only: Sequence[str] = (),
) -> Finished:
    """The finished runs in ``root`` of one protocol and data set; raises ``UserError`` if there are none, or several."""
    if accuracy not in ACCURACIES:
        raise UserError(f"--accuracy {accuracy}: choose {' or '.join(ACCURACIES)}")
    runs = [run for run in tables.list_runs(root) if run.folder.results()]
    for arch in only:
        if runs and all(run.config.arch != arch for run in runs):
            raise UserError(
                f"--arch {arch}: {root} holds finished runs of {', '.join({r.config.arch for r in runs})}; choose one"
            )
    wanted = {*only, *(LARGER[arch] for arch in only if arch in LARGER)}
    runs = [run for run in runs if not only or run.config.arch in wanted]
    runs = _only(runs, "--data", data, lambda config: config.data_name, root)
    runs = _only(runs, "--protocol", protocol, protocol_of, root)
    for run in runs[1:]:
        for option, value in runs[0].config.options().items():
            if option not in FREE and getattr(run.config, option) != value:
                raise UserError(
                    f"{run.folder.path} has {option} {getattr(run.config, option)} and {runs[0].folder.path} {value}; "
                    "they cannot be compared in one figure: keep them in separate folders, or choose a --protocol"
                )
    return Finished(runs, protocol_of(runs[0].config), accuracy, tuple(only))


def _only(runs: list[Run], option: str, wanted: str | None, name: Callable[[Config], str], root: Path) -> list[Run]:
    found = {name(run.config) for run in runs}
    if wanted is None and len(found) > 1:
        raise UserError(f"{root} holds runs of {', '.join(sorted(found))}; choose one with {option}")
    chosen = [run for run in runs if wanted in (None, name(run.config))]
    if not chosen:
        what = f" with {option} {wanted}" if wanted else ""
        raise UserError(f"{root} holds no finished run{what}; train one with python -m experiments.fig1")
    return chosen
