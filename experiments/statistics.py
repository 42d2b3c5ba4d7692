"""How a claim is judged: a number per seed, its 95 % interval over seeds, and a verdict that small samples cannot force."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

HOLDS, FAILS, UNKNOWN = "holds", "fails", "not enough evidence"


@dataclass(frozen=True)
class Part:
    """One statistic of a claim, for one network."""

    what: str
    wanted: str
    """The relation that makes it hold, such as ``> 0``."""
    values: tuple[float, ...]
    """One per seed."""
    verdict: str
    runs: tuple[str, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.values)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean, mean ± t(0.975, n−1)·s/√n; unbounded for fewer than two values.

    >>> [round(end, 3) for end in interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    values = list(values)
    if len(values) < 2:
        return -math.inf, math.inf
    mean, half = sum(values) / len(values), float(stats.t.ppf(0.975, len(values) - 1)) * standard_error(values)
    return mean - half, mean + half


def standard_error(values: Iterable[float]) -> float:
    """s/√n of at least two values.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    series = pd.Series(list(values))
    return float(series.std(ddof=1) / math.sqrt(len(series)))


def between(low: float, high: float, values: Iterable[float]) -> str:
    """Holds if the 95 % interval lies within [low, high], fails if it lies outside, else not enough evidence.

    >>> between(0, math.inf, [1.0, 1.2, 1.1]), between(0, math.inf, [-1.0, -1.2, -1.1]), between(0, math.inf, [-1.0, 1.2])
    ('holds', 'fails', 'not enough evidence')
    """
    least, most = interval(values)
    if low <= least and most <= high:
        return HOLDS
    return FAILS if most < low or least > high else UNKNOWN


def judged(what: str, low: float, high: float, values: Any, runs: Iterable[str]) -> Part:
    """A part that holds where the interval of ``values`` (a series over seeds) lies within [low, high]."""
    numbers = tuple(float(v) for v in pd.Series(values, dtype=float).dropna())
    wanted = f"> {low:g}" if high == math.inf else f"< {high:g}" if low == -math.inf else f"{low:g} to {high:g}"
    return Part(what, wanted, numbers, between(low, high, numbers), tuple(sorted(set(runs))))


def above(what: str, values: Any, runs: Iterable[str], bound: float = 0.0) -> Part:
    """A part that holds where ``values`` lie above ``bound``."""
    return judged(what, bound, math.inf, values, runs)


def below(what: str, values: Any, runs: Iterable[str], bound: float = 0.0) -> Part:
    """A part that holds where ``values`` lie below ``bound``."""
    return judged(what, -math.inf, bound, values, runs)


def together(verdicts: Iterable[str]) -> str:
    """A claim holds if all its parts do, and fails if one does.

    >>> together([HOLDS, UNKNOWN]), together([HOLDS, FAILS, UNKNOWN]), together([HOLDS]), together([])
    ('not enough evidence', 'fails', 'holds', 'not enough evidence')
    """
    verdicts = list(verdicts)
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and all(v == HOLDS for v in verdicts) else UNKNOWN


@dataclass(frozen=True, eq=False)
class Curve:
    """The finished levels of one kind of ticket of one network, over seeds."""

    frame: pd.DataFrame

    @property
    def runs(self) -> list[str]:
        return list(self.frame["run"].unique())

    def at(self, column: str, low: float = 0.0, high: float = 1.0) -> pd.Series:
        """Per seed the mean of ``column`` over the pruned levels whose density is in [low, high]."""
        rows = self.frame[(self.frame["level"] > 0) & self.frame["density"].between(low - 1e-9, high + 1e-9)]
        return rows.groupby("seed")[column].mean()

    def dense(self, column: str) -> pd.Series:
        """Per seed ``column`` of the dense level."""
        return self.frame[self.frame["level"] == 0].set_index("seed")[column]

    def sparsest(self, column: str) -> pd.Series:
        """Per seed ``column`` of the sparsest level that all seeds have finished."""
        levels = self.frame.groupby("level")["seed"].nunique()
        last = levels[levels == levels.max()].index.max() if len(levels) else -1
        return self.frame[self.frame["level"] == last].set_index("seed")[column]

    def by_level(self, column: str) -> pd.DataFrame:
        """``column`` by seed (rows) and level (columns)."""
        return self.frame.pivot_table(index="seed", columns="level", values=column)

    def ahead_of(self, other: Curve, column: str, low: float = 0.0, high: float = 1.0) -> pd.Series:
        """Per seed the mean difference to ``other`` over the pruned levels that both have in [low, high]."""
        key = ["seed", "level"]
        both = self.frame.merge(other.frame, on=key, suffixes=("", "_other"))
        return Curve(both.assign(difference=both[column] - both[f"{column}_other"])).at("difference", low, high)
