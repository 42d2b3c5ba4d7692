"""The finished runs behind a figure: runs of one protocol on one data set, and what is kept of others, as tables, with the words for a title."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.study import kept
from experiments.study.kept import Tables
from experiments.study.protocols import FREE, LARGER, PROTOCOLS, base_rate, describe, protocol_of
from pyro_lottery import tables
from pyro_lottery.errors import UserError
from pyro_lottery.runs.config import preset
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
    others: Sequence[Tables] = ()
    """What is kept of other runs."""
    complete: bool = False
    """Whether only runs with all levels of their protocol count, and controls and transplants likewise."""

    @cached_property
    def all_levels(self) -> pd.DataFrame:
        """The finished levels of all runs, controls and transplants; ``run`` is a path within its folder of runs; ``accuracy`` is in
        percent; ``base`` marks runs with the protocol's learning rate and no warm-up; ``description`` names data and protocol. Raises ``UserError`` for two
        copies of a run in one folder, since a copy is not another seed.
        """
        sources = [*map(self._levels, self.sources), *(levels for levels, _ in self.others)]
        frame = kept.merged([self._whole(levels) for levels in sources] if self.complete else sources)
        return frame.assign(accuracy=100 * frame[self.accuracy], percent=100 * frame["density"])

    @property
    def levels(self) -> pd.DataFrame:
        """The ``base`` rows of ``all_levels``, which all figures except figure 7 show."""
        return self.all_levels[self.all_levels["base"]]

    @property
    def own_levels(self) -> pd.DataFrame:
        """The rows of ``levels`` whose runs are here, with their tickets and times; raises ``UserError`` if there is no run."""
        if not self.runs:
            raise UserError("this shows tickets or times, which are not kept without their runs; name a folder of runs")
        return self.levels[self.levels["source"] < len(self.sources)]

    @cached_property
    def layers(self) -> pd.DataFrame:
        """``tables.layers`` of the runs pruned by snr and of the deterministic runs, per network at the level that is kept of others, or else at the last that
        all of them have finished. Raises ``UserError`` if some of what is kept is missing.
        """
        last = of_guides(self.levels).groupby(["arch", "source", "run"])["level"].max()
        folders, parts = self.sources, list[pd.DataFrame]()
        for source, (_, layers) in enumerate(self.others, start=len(folders)):
            parts.append(layers[layers["run"].isin([run for _, number, run in last.index if number == source])])
        wanted = {arch: rows["level"].max() for layers in parts for arch, rows in layers.groupby("arch")}
        for (arch, source, name), finished in last.items():
            level = int(wanted.get(arch, last[arch].min()))
            if source < len(folders) and level <= finished:
                (run,) = (run for run in folders[source] if run.folder.path.name == name)
                parts.append(tables.layers([run], level).assign(run=name))
        if not parts:
            return pd.DataFrame(columns=["arch", "run", "level"])
        found = pd.concat(parts, ignore_index=True)
        if lost := {run for _, source, run in last.index if source >= len(folders)} - set(found["run"]):
            raise UserError(f"the layers of {min(lost)} are missing in what is kept")
        of_runs = found.groupby(["arch", "run"]).agg(level=("level", "max"), sites=("site", "nunique"))
        for arch, rows in of_runs.groupby("arch"):
            if rows["level"].nunique() > 1 or rows["sites"].nunique() > 1:
                raise UserError(f"the layers of runs of {arch} differ in level or number, so they cannot be compared")
        return found

    @cached_property
    def sources(self) -> list[list[Run]]:
        """The runs of each folder; ``all_levels`` numbers these first, then ``others``."""
        found: dict[Path, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.folder.path.parent, []).append(run)
        return list(found.values())

    def _levels(self, runs: list[Run]) -> pd.DataFrame:
        """``tables.levels`` of the runs of one folder, with what is kept beside."""
        frame = tables.levels(runs)
        rate = frame["lr"].mode()[0] if self.protocol == "custom" else base_rate(self.protocol)
        facts = {
            str(derived.folder.path): {
                "run": derived.folder.path.relative_to(run.folder.path.parent).as_posix(),
                "description": f"{run.config.data_name}, {describe(run.config)}",
                "hardware": hardware(derived),
                "planned": run.config.levels,
            }
            for run in runs
            for _, derived in tables.with_derived(run)
        }
        frame = frame.assign(**pd.DataFrame([facts[run] for run in frame["run"]], index=frame.index))
        return frame.assign(base=(frame["lr"] == rate) & (frame["warmup_epochs"] == 0), protocol=self.protocol)

    def _whole(self, levels: pd.DataFrame) -> pd.DataFrame:
        """The complete runs, controls and transplants. ``--levels`` may differ from the protocol's, and would change the level at which all are compared."""
        extent, whole = PROTOCOLS.get(self.protocol), list[str]()
        for (run, treatment), rows in levels.groupby(["run", "treatment"]):
            found, most = set(rows["level"]), int(rows["planned" if "planned" in rows else "level"].max())
            most = preset(self.protocol).levels if extent else most
            derived = extent.derived_levels if extent else None
            wanted = set(range(most + 1)) if treatment == "imp" else set(derived or range(1, most + 1))
            whole += [run] if found == wanted or (treatment != "imp" and found > wanted) else []
        return levels[levels["run"].isin(whole)]

    @property
    def archs(self) -> list[str]:
        """The networks to show."""
        found = list(self.all_levels["arch"].unique())
        return [arch for arch in self.only if arch in found] or found

    @property
    def description(self) -> str:
        """Data set and protocol, so that a reduced figure is not mistaken for the paper's; with the patches of transformers, if they are shown."""
        return max(self.all_levels.loc[self.all_levels["arch"].isin(self.archs), "description"], key=len)


def hardware(run: Run) -> str:
    """The machine that trained a run, and its threads."""
    found = run.folder.config.get("hardware")
    return f"{found['device']} {found['name']}, threads: {found['threads']}" if found else "unknown"


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
    folders = [roots] if isinstance(roots, Path) else list(roots)
    return _chosen(folders, *_sources(folders), protocol, data, accuracy, only)


def read_all(roots: Sequence[Path], protocol: str | None = None, data: str | None = None) -> list[Finished]:
    """:func:`read` of ``protocol``, or else of every protocol that there is; of ``custom`` only if there is no other."""
    runs, others = _sources(roots)
    found = {protocol_of(run.config) for run in runs if data in (None, run.config.data_name)}
    for levels, _ in others:
        found.update(levels["protocol"] if data is None else levels.loc[kept.data_of(levels) == data, "protocol"])
    names = [protocol] if protocol else sorted(found - {"custom"}) or [None]
    return [_chosen(roots, runs, others, name, data) for name in names]


def _sources(roots: Sequence[Path]) -> tuple[list[Run], list[Tables]]:
    """The runs with a finished level in folders of runs, and what the others keep."""
    runs, others = list[Run](), []
    for root in {root.resolve(): root for root in roots}.values():
        if kept.holds(root):
            others.append(kept.read(root))
        else:
            if (root / kept.LEVELS).exists():
                print(f"{root} holds runs, so its {kept.LEVELS} is not read", file=sys.stderr)
            runs += [run for run in tables.list_runs(root) if run.folder.results()]
    return runs, others


def _chosen(
    roots: Sequence[Path],
    runs: list[Run],
    others: Sequence[Tables],
    protocol: str | None,
    data: str | None,
    accuracy: str = "test_accuracy",
    only: Sequence[str] = (),
) -> Finished:
    if accuracy not in ACCURACIES:
        raise UserError(f"--accuracy {accuracy}: choose {' or '.join(ACCURACIES)}")
    where = " and ".join(map(str, roots))
    archs = {run.config.arch for run in runs}.union(*(levels["arch"] for levels, _ in others))
    for arch in only:
        if archs and arch not in archs:
            raise UserError(f"--arch {arch}: {where} holds finished runs of {', '.join(sorted(archs))}; choose one")
    wanted = {*only, *(LARGER[arch] for arch in only if arch in LARGER)} or archs
    runs = [run for run in runs if run.config.arch in wanted]
    others = [each.where(each.levels["arch"].isin(wanted)) for each in others]
    ways = (
        ("--data", data, lambda config: config.data_name, kept.data_of),
        ("--protocol", protocol, protocol_of, lambda levels: levels["protocol"]),
    )
    for option, name, of_run, of_kept in sorted(
        ways, key=lambda way: way[1] is None
    ):  # what is given may decide the other
        names = {of_run(run.config) for run in runs}.union(*(of_kept(levels) for levels, _ in others))
        if not names or name not in {None, *names}:
            what = f" with {option} {name}, but of {', '.join(sorted(names))}" if names else ""
            raise UserError(f"{where} holds no finished run{what}; train one with python -m experiments.fig1")
        if name is None and len(names) > 1:
            raise UserError(f"{where} holds runs of {', '.join(sorted(names))}; choose one with {option}")
        name = name or names.pop()
        runs = [run for run in runs if of_run(run.config) == name]
        others = [each.where(of_kept(each.levels) == name) for each in others]
    others = [each for each in others if len(each.levels)]
    found = protocol_of(runs[0].config) if runs else str(others[0].levels["protocol"].iloc[0])
    if found == "custom" and len({run.folder.path.parent for run in runs}) + len(others) > 1:
        raise UserError(
            f"{where}: runs that follow no protocol are compared within one folder only, since nothing says that they are alike"
        )
    for run in runs[1:]:
        for option, value in runs[0].config.options().items():
            if option not in FREE and getattr(run.config, option) != value:
                raise UserError(
                    f"{run.folder.path} has {option} {getattr(run.config, option)} and {runs[0].folder.path} {value}; "
                    "they cannot be compared in one figure: keep them in separate folders, or choose a --protocol"
                )
    return Finished(runs, found, accuracy, tuple(only), others)
