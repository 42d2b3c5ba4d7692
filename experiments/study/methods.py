"""The ways to a sparse network that are compared, and how many epochs each has."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_lottery.errors import UserError
from pyro_lottery.runs.config import Config

PRUNINGS = 4
"""Prunings of an iterative method."""


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


def of_equal_seconds(table: pd.DataFrame, methods: Mapping[str, Method]) -> dict[tuple[str, float], int]:
    """Epochs by method and density with which each trains as long as the first of ``methods``; ``table`` has rows of :func:`row_of`.

    They are a multiple of the method's trainings, and at least one each; seconds are those of training steps, without scores, as medians over seeds. Raises ``UserError`` if a method is not in the table.
    """
    seconds = table.groupby(["method", "wanted"])[["seconds", "epochs"]].median()
    pairs = [(name, density) for name in methods for density in dict.fromkeys(table["wanted"])]
    if missing := [f"{name} at {density:g}" for name, density in pairs if (name, density) not in seconds.index]:
        raise UserError(
            f"--equal-seconds: the table has no {', '.join(missing)}; give methods_seeds.csv of the same methods and densities"
        )
    first, found = next(iter(methods)), {}
    for (name, density), row in seconds.loc[list(methods)].iterrows():  # type: ignore[misc]
        target = seconds.loc[(first, density), "seconds"]
        trainings = methods[name].trainings
        found[(name, density)] = trainings * max(1, round(target * row["epochs"] / row["seconds"] / trainings))
    return found


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
