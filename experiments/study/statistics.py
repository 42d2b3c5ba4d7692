"""How a claim is judged: a number per seed, its 95 % interval over seeds, and a verdict, which too few seeds do not give."""

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
    """The relation for which it holds, such as ``> 0``."""
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


MIN_SEEDS = 3
"""Fewer seeds are not enough evidence. An interval from two values is very wide, or has no width if the two are equal, as
accuracies on few test images can be.
"""


def between(low: float, high: float, values: Iterable[float]) -> str:
    """Holds if the 95 % interval lies within [low, high], fails if it lies outside, else not enough evidence. A bound
    itself counts as inside only if both bounds are finite.

    >>> up = (0.0, math.inf)
    >>> between(*up, [1.0, 1.2, 1.1]), between(*up, [-1.0, -1.2, -1.1]), between(*up, [-1.0, 1.2, 0.5])
    ('holds', 'fails', 'not enough evidence')
    >>> between(*up, [0.0, 0.0, 0.0]), between(*up, [1.0, 1.2])
    ('fails', 'not enough evidence')
    """
    values = list(values)
    if len(values) < MIN_SEEDS:
        return UNKNOWN
    least, most = interval(values)
    if high == math.inf:
        return HOLDS if least > low else FAILS if most <= low else UNKNOWN
    if low == -math.inf:
        return HOLDS if most < high else FAILS if least >= high else UNKNOWN
    if low <= least and most <= high:
        return HOLDS
    return FAILS if most < low or least > high else UNKNOWN


def judged(what: str, low: float, high: float, values: Any, runs: Iterable[str]) -> Part:
    """A part that holds if the interval of ``values`` (a series over seeds) lies within [low, high]."""
    numbers = tuple(float(v) for v in pd.Series(values, dtype=float).dropna())
    wanted = f"> {low:g}" if high == math.inf else f"< {high:g}" if low == -math.inf else f"{low:g} to {high:g}"
    return Part(what, wanted, numbers, between(low, high, numbers), tuple(sorted(set(runs))))


def above(what: str, values: Any, runs: Iterable[str], bound: float = 0.0) -> Part:
    """A part that holds if ``values`` lie above ``bound``."""
    return judged(what, bound, math.inf, values, runs)


def below(what: str, values: Any, runs: Iterable[str], bound: float = 0.0) -> Part:
    """A part that holds if ``values`` lie below ``bound``."""
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


def rank_correlation(layers: pd.DataFrame) -> pd.Series:
    """Spearman's ρ of depth and sparsity per seed, over the layers of the main path. The convolutions of shortcuts are
    left out, since they have no depth of their own.
    """
    path = layers[~layers["site"].str.contains("shortcut|downsample")]
    groups = path.groupby("seed")[["depth", "sparsity"]]
    return pd.Series({seed: g["depth"].corr(g["sparsity"], "spearman") for seed, g in groups}, dtype=float)


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

    def from_dense(self, column: str) -> pd.DataFrame:
        """The difference to the dense level by seed (rows) and pruned level (columns)."""
        values = self.by_level(column)
        if 0 not in values.columns:
            return values.iloc[:, :0]
        return values.drop(columns=0).sub(values[0], axis=0)

    def up_to(self, density: float) -> Curve:
        """The levels of at least this density."""
        return Curve(self.frame[self.frame["density"] >= density - 1e-9])

    def sparsest(self, column: str) -> pd.Series:
        """Per seed ``column`` of the sparsest level that all seeds have finished."""
        levels = self.frame.groupby("level")["seed"].nunique()
        last = levels[levels == levels.max()].index.max() if len(levels) else -1
        return self.frame[self.frame["level"] == last].set_index("seed")[column]

    def gaps(self, other: Curve, column: str) -> pd.DataFrame:
        """The difference to ``other`` by seed (rows) and pruned level that both have (columns)."""
        both = self.by_level(column) - other.by_level(column)
        return both.loc[:, [level for level in both.columns if level > 0 and both[level].notna().any()]]

    def by_level(self, column: str) -> pd.DataFrame:
        """``column`` by seed (rows) and level (columns)."""
        return self.frame.pivot_table(index="seed", columns="level", values=column)

    def ahead_of(self, other: Curve, column: str, low: float = 0.0, high: float = 1.0) -> pd.Series:
        """Per seed the mean difference to ``other`` over the pruned levels that both have in [low, high]."""
        key = ["seed", "level"]
        both = self.frame.merge(other.frame, on=key, suffixes=("", "_other"))
        return Curve(both.assign(difference=both[column] - both[f"{column}_other"])).at("difference", low, high)
