"""The jobs of a study: an IMP run, a control of its tickets, and their transplant. Each has a folder, levels, the job whose
tickets it needs, level by level, and a way to run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from experiments.study.level_0 import source_of
from experiments.study.protocols import Protocol
from pyro_lottery.controls import run_control
from pyro_lottery.errors import NotShared
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.config import RESUMABLE, Config, preset
from pyro_lottery.runs.config import from_json as config_from_json
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.loaded import load_run
from pyro_lottery.runs.sharing import gives_level_0
from pyro_lottery.tables import list_runs
from pyro_lottery.transplant import transplant_run


@dataclass(frozen=True)
class Imp:
    """Iterative magnitude pruning with a config; continues an unfinished run, and copies level 0 if another run has trained it."""

    config: Config
    shares: Imp | None = field(default=None, compare=False)
    """A run of the study that trains the same level 0, so that this one waits for it."""

    def __str__(self) -> str:
        c = self.config
        more = [f"rewind {c.rewind}"] if c.rewind != "init" else []
        more += [f"lr {c.lr:g}"] if c.lr != Config.lr else []
        more += [f"warm-up {c.warmup_epochs}"] if c.warmup_epochs else []
        more += ["level 0"] if c.levels == 0 else []
        return ", ".join([c.arch, c.guide, c.score, *more, f"seed {c.seed}"])

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(range(self.config.levels + 1))

    def folder(self, root: Path) -> RunFolder:
        """The folder in ``root`` of a run with this config, whatever its name; else the folder of the future run."""
        usual = RunFolder(root / self.config.name())
        if (usual.path / "config.json").exists() and _same(self.config, load_run(usual.path).config):
            return usual  # the others, which may be many, are not read
        runs = list_runs(root) if root.is_dir() else []
        return next((run.folder for run in runs if _same(self.config, run.config)), usual)

    def needs(self) -> Imp | None:
        return None

    def run(self, root: Path) -> None:
        config = replace(self.config, run_dir=str(self.folder(root).path))
        source = source_of(config, root) if 0 in unfinished(self, root) else None
        if source is not None:
            try:
                run_imp(replace(config, level0_from=str(source.path)))
                return
            except NotShared as error:  # trained on another machine, with other versions, or damaged
                warnings.warn(f"{config.run_dir} trains level 0 itself: {error.__cause__ or error}", stacklevel=2)
        run_imp(config)


@dataclass(frozen=True)
class Control:
    """A randomised control of a run's tickets."""

    of: Imp
    control: str
    levels: tuple[int, ...]

    @property
    def config(self) -> Config:
        return self.of.config

    def __str__(self) -> str:
        return f"{self.of}: {self.control}"

    def folder(self, root: Path) -> RunFolder:
        return self.of.folder(root).derived("controls", self.control)

    def needs(self) -> Imp | None:
        return self.of

    def run(self, root: Path) -> None:
        run_control(load_run(self.of.folder(root).path), self.control, self.levels, self.config.device)


@dataclass(frozen=True)
class Transplant:
    """The transplant of a deterministic run's tickets."""

    of: Imp
    levels: tuple[int, ...]

    @property
    def config(self) -> Config:
        return replace(self.of.config, guide="mean_field")

    def __str__(self) -> str:
        return f"{self.of}: transplant"

    def folder(self, root: Path) -> RunFolder:
        return self.of.folder(root).derived("transplant")

    def needs(self) -> Imp | None:
        return self.of

    def run(self, root: Path) -> None:
        transplant_run(load_run(self.of.folder(root).path), self.levels, device=self.config.device)


Job = Imp | Control | Transplant


def to_json(job: Job) -> dict[str, Any]:
    """``job`` as plain values for JSON."""
    if isinstance(job, Imp):
        return {"config": job.config.options()}
    control = {"control": job.control} if isinstance(job, Control) else {}
    return {"config": job.of.config.options(), "levels": list(job.levels), **control}


def from_json(values: dict[str, Any]) -> Job:
    """The inverse of ``to_json``.

    >>> run = Imp(preset("quick"))
    >>> all(from_json(to_json(job)) == job for job in (run, Control(run, "reinit", (1, 2)), Transplant(run, (1,))))
    True
    """
    run = Imp(config_from_json(values["config"]))
    if "levels" not in values:
        return run
    levels = tuple(values["levels"])
    return Control(run, values["control"], levels) if "control" in values else Transplant(run, levels)


def unfinished(job: Job, root: Path) -> list[int]:
    """The levels of ``job`` that are not finished, or whose files are missing."""
    folder = job.folder(root)
    done = {row.level for row in folder.results() if folder.level(row.level).has_files()}
    return [level for level in job.levels if level not in done]


def ready(job: Job, root: Path) -> Job | None:
    """The part of ``job`` that can be trained now: all of a run, those levels of a control or transplant whose tickets exist.

    None if there is no such level, or if another run trains level 0 first. A ticket exists when its level and all levels before
    it are finished, which the manifests in the run's folder say; the run itself may be training a later level.
    """
    left, needed = unfinished(job, root), job.needs()
    if isinstance(job, Imp) or needed is None:
        waits = isinstance(job, Imp) and 0 in left and job.shares is not None and 0 in unfinished(job.shares, root)
        return job if left and not waits else None
    missing = min(unfinished(needed, root), default=math.inf) if left else 0
    there = tuple(level for level in left if level < missing)
    return replace(job, levels=there) if there else None


def share_level_0(jobs: Iterable[Job]) -> list[Job]:
    """``jobs`` without duplicates; each run ``shares`` the first before it that trains the same level 0."""
    first, found = list[Imp](), list[Job]()
    for job in dict.fromkeys(jobs):
        if isinstance(job, Imp):
            job = replace(job, shares=next((run for run in first if gives_level_0(run.config, job.config)), None))
            first += [job] if job.shares is None else []
        found.append(job)
    return found


def released(job: Job, failed: Collection[Job]) -> Job:
    """``job``; a run whose level 0 was to come from a failed one trains it itself."""
    return replace(job, shares=None) if isinstance(job, Imp) and job.shares in failed else job


def untrained(job: Job, root: Path) -> list[int]:
    """The levels of ``job`` that are not finished and that it trains itself: all but a level 0 that it copies."""
    left = unfinished(job, root)
    if isinstance(job, Imp) and 0 in left and (job.shares or source_of(job.config, root)):
        return [level for level in left if level > 0]
    return left


def _same(wanted: Config, found: Config) -> bool:
    """Whether ``found`` is a run of ``wanted``, in any folder and with any number of levels. A saved run has a concrete
    precision, so ``auto`` matches both.
    """
    free = RESUMABLE | ({"precision"} if wanted.precision == "auto" else set())
    options = [f.name for f in fields(Config) if f.name not in free]
    return wanted.data_name == found.data_name and all(getattr(wanted, o) == getattr(found, o) for o in options)


@dataclass(frozen=True)
class Study:
    """A protocol on some networks and seeds, with options for every run (data, device)."""

    protocol: str
    extent: Protocol
    archs: tuple[str, ...]
    seeds: tuple[int, ...]
    options: dict[str, Any]

    def imp(self, arch: str, seed: int, guide: str = "mean_field", score: str = "snr", **more: Any) -> Imp:
        """One run of the study."""
        options = self.extent.options(arch) | self.options | more
        return Imp(preset(self.protocol, arch=arch, seed=seed, guide=guide, score=score, **options))

    def each(self) -> Iterator[tuple[int, str]]:
        """``(seed, network)``, seed by seed, so that an unfinished study has runs of all networks."""
        return ((seed, arch) for seed in self.seeds for arch in self.archs)

    def derived_levels(self, run: Imp) -> tuple[int, ...]:
        """The levels of ``run`` that get controls and transplants."""
        return self.extent.derived_levels or run.levels[1:]
