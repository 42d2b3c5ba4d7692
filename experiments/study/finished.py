"""The finished runs behind a figure: runs of one protocol on one data set, and what is kept of others, as tables, with the words for a title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.study import kept
from experiments.study.protocols import FREE, LARGER, base_rate, describe, protocol_of
from pyro_lottery import tables
from pyro_lottery.errors import UserError
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
    others: Sequence[kept.Tables] = ()
    """What is kept of other runs."""

    @cached_property
    def all_levels(self) -> pd.DataFrame:
        """The finished levels of all runs, controls and transplants; ``run`` is a path within its folder of runs; ``accuracy`` is in
        percent; ``base`` marks runs with the protocol's learning rate and no warm-up; ``description`` names data and protocol. Raises ``UserError`` for two
        copies of a run, since a copy is not another seed.
        """
        frame = tables.levels(self.runs)
        key = ["treatment", *tables.OPTIONS, "level"]
        for _, copies in frame[frame.duplicated(key, keep=False)].groupby(key):
            raise UserError(f"{' and '.join(copies['run'])} are the same run; keep one of them in the folder")
        rate = frame["lr"].mode().max() if self.protocol == "custom" else base_rate(self.protocol)
        said = {run.config.arch: f"{run.config.data_name}, {describe(run.config)}" for run in self.runs}
        frame = frame.assign(
            run=[self.names[run] for run in frame["run"]],
            base=(frame["lr"] == rate) & (frame["warmup_epochs"] == 0),
            protocol=self.protocol,
            description=frame["arch"].map(said),
        )
        frame = kept.joined([frame, *(levels for levels, _ in self.others)])
        return frame.assign(accuracy=100 * frame[self.accuracy], percent=100 * frame["density"])

    @property
    def levels(self) -> pd.DataFrame:
        """The ``base`` rows of ``all_levels``, which all figures except figure 7 show."""
        return self.all_levels[self.all_levels["base"]]

    @property
    def own_levels(self) -> pd.DataFrame:
        """The rows of ``levels`` whose runs are here, with their times and tickets."""
        return self.levels[self.levels["run"].isin(self.names.values())]

    @cached_property
    def layers(self) -> pd.DataFrame:
        """``tables.layers`` of the runs pruned by snr and of the deterministic runs, per network at the level that is kept of others, or else at the last that
        all of them have finished.
        """
        last = of_guides(self.levels).groupby(["arch", "run"])["level"].max()
        wanted = {arch: rows["level"].max() for _, layers in self.others for arch, rows in layers.groupby("arch")}
        parts, runs = [], {run.folder.path.name: run for run in self.runs}
        own = last[last.index.isin(list(runs), level="run")]
        for (arch, name), finished in own.items():
            if finished >= (level := int(wanted.get(arch, own[arch].min()))):
                parts.append(tables.layers([runs[name]], level).assign(run=name))
        parts += [
            layers[layers["run"].isin(set(last.index.get_level_values("run")) - set(runs))] for _, layers in self.others
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["arch", "run"])

    @cached_property
    def names(self) -> dict[str, str]:
        """By path, the path within its folder of runs, of every run, control and transplant that is here."""
        paths = [(run.folder.path.parent, d.folder.path) for run in self.runs for _, d in tables.with_derived(run)]
        return {str(path): str(path.relative_to(root)) for root, path in paths}

    @property
    def archs(self) -> list[str]:
        """The networks to show."""
        found = list(self.all_levels["arch"].unique())
        return [arch for arch in self.only if arch in found] or found

    @property
    def description(self) -> str:
        """Data set and protocol, so that a reduced figure is not mistaken for the paper's; with the patches of transformers, if there are any."""
        return max(self.all_levels["description"], key=len)


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
    roots: Path | Sequence[Path],
    protocol: str | None = None,
    data: str | None = None,
    accuracy: str = "test_accuracy",
    only: Sequence[str] = (),
) -> Finished:
    """The finished runs in one or more folders, and what is kept there of others, of one protocol and data set; raises ``UserError`` if there are none, or
    several.
    """
    if accuracy not in ACCURACIES:
        raise UserError(f"--accuracy {accuracy}: choose {' or '.join(ACCURACIES)}")
    folders = [roots] if isinstance(roots, Path) else list(roots)
    where = " and ".join(map(str, folders))
    runs, others = _sources(folders)
    archs = {run.config.arch for run in runs}.union(*(levels["arch"] for levels, _ in others))
    for arch in only:
        if archs and arch not in archs:
            raise UserError(f"--arch {arch}: {where} holds finished runs of {', '.join(sorted(archs))}; choose one")
    wanted = {*only, *(LARGER[arch] for arch in only if arch in LARGER)} or archs
    runs = [run for run in runs if run.config.arch in wanted]
    others = [kept.rows(each, each[0]["arch"].isin(wanted)) for each in others]
    for option, chosen, of_run, of_kept in (
        ("--data", data, lambda config: config.data_name, kept.data_of),
        ("--protocol", protocol, protocol_of, lambda levels: levels["protocol"]),
    ):
        names = {of_run(run.config) for run in runs}.union(*(of_kept(levels) for levels, _ in others))
        if chosen is None and len(names) > 1:
            raise UserError(f"{where} holds runs of {', '.join(sorted(names))}; choose one with {option}")
        if not names or chosen not in {None, *names}:
            what = f" with {option} {chosen}, but of {', '.join(sorted(names))}" if names else ""
            raise UserError(f"{where} holds no finished run{what}; train one with python -m experiments.fig1")
        chosen = chosen or names.pop()
        runs = [run for run in runs if of_run(run.config) == chosen]
        others = [kept.rows(each, of_kept(each[0]) == chosen) for each in others]
    for run in runs[1:]:
        for option, value in runs[0].config.options().items():
            if option not in FREE and getattr(run.config, option) != value:
                raise UserError(
                    f"{run.folder.path} has {option} {getattr(run.config, option)} and {runs[0].folder.path} {value}; "
                    "they cannot be compared in one figure: keep them in separate folders, or choose a --protocol"
                )
    return Finished(runs, chosen, accuracy, tuple(only), others)


def read_all(roots: Sequence[Path], protocol: str | None = None, data: str | None = None) -> list[Finished]:
    """:func:`read` of ``protocol``, or else of every protocol that there is; of ``custom`` only if there is no other."""
    runs, others = _sources(roots)
    found = {protocol_of(run.config) for run in runs if data in (None, run.config.data_name)}
    for levels, _ in others:
        found.update(levels["protocol"] if data is None else levels.loc[kept.data_of(levels) == data, "protocol"])
    names = [protocol] if protocol else sorted(found - {"custom"}) or [None]
    return [read(roots, name, data) for name in names]


def _sources(roots: Sequence[Path]) -> tuple[list[Run], list[kept.Tables]]:
    """The runs with a finished level in folders of runs, and what the others keep."""
    folders = [root for root in roots if not kept.holds(root)]
    runs = [run for root in folders for run in tables.list_runs(root) if run.folder.results()]
    return runs, [kept.read(root) for root in roots if kept.holds(root)]
