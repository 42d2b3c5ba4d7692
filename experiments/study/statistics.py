"""How a claim is judged: a number per seed, one-sided tests of its mean over seeds, and verdicts whose chances of error are bounded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

HOLDS, FAILS, EQUIVALENT, UNKNOWN = "holds", "fails", "equivalent", "cannot tell"
ERROR = 0.025
"""The chance, at most, that a claim holds where it is false, that it fails where it is true, and that a difference counts as equivalent to 0 where it is
not; for about normal noise over seeds."""
MIN_SEEDS = 3
"""Fewer seeds cannot tell. Two values may be equal, as accuracies on few test images can be."""
EQUAL = 1e-5
"""Values that differ by less are equal: it is above the rounding of accuracies in single precision, and far below an image of a test set."""
ROUNDED = 1e-3
"""The share by which a density may be beyond a bound, since masks hold whole weights."""


@dataclass(frozen=True)
class Part:
    """One statistic of a claim, for one network, with the one-sided p-values of its three verdicts (Student's t, paired by seed)."""

    what: str
    wanted: str
    """The relation for which it holds, such as ``> 0``."""
    values: tuple[float, ...]
    """One per seed; of a relation at every level, those of the level where it is worst."""
    runs: tuple[str, ...]
    p_holds: float = 1.0
    """If the relation is false, the chance of values that speak as much for it."""
    p_fails: float = 1.0
    """If it is true, the chance of values that speak as much against it."""
    p_equivalent: float = 1.0
    """If the mean is outside ±margin, the chance of values as close to 0; 1 for a relation without a margin."""
    p_flips: float | None = None
    """As ``p_holds``, by :func:`sign_flip`; None without values and for a relation of two bounds."""
    tests: int = 1
    """How many tests each can make it fail; its failure is corrected over them."""
    why_not: str = ""
    """Why it is not judged, if its values are none that the claim is about."""
    margin: float | None = None
    verdict: str = UNKNOWN
    """By :func:`corrected`, together with the other parts of the claim."""
    beside: int = 1
    """How many parts the claim has for the same network."""
    needed: int = 0
    """How many seeds the study has for the network; with fewer values the part is not judged."""

    @property
    def network(self) -> str:
        """The network that it is about."""
        return self.what.split(":")[0].split(",")[0]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.values)

    @property
    def smallest(self) -> float:
        """How far beyond a bound the mean of ``values`` has to be to count, by their spread, if this is the clearest of the parts."""
        if len(self.values) < MIN_SEEDS or self.why_not:
            return math.inf
        chance = ERROR / self.beside / self.tests
        return float(stats.t.isf(chance, len(self.values) - 1)) * standard_error(self.values)


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


def bca(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % BCa bootstrap interval of the mean (Efron 1987), of 9,999 resamples; None for fewer than five values, or (nearly) equal ones.

    Shown beside the t interval, and no verdict's: with five values it covers the mean in fewer than 92 % of samples.
    """
    if len(values) < 5 or standard_error(values) < EQUAL:
        return None
    found = stats.bootstrap((list(values),), np.mean, method="BCa", rng=np.random.default_rng(0))
    return tuple(map(float, found.confidence_interval))  # type: ignore[return-value]


def sign_flip(values: Sequence[float], bound: float = 0.0) -> float:
    """The one-sided p-value of a mean above ``bound`` by all flips of signs of the differences to it; at least 2⁻ⁿ.

    >>> sign_flip([1.0, 2.0, 3.0]), sign_flip([1.0, -2.0])
    (0.125, 0.75)
    """
    found = np.array(values, dtype=float) - bound
    if not len(found):
        return 1.0
    if len(found) > 16:
        result = stats.permutation_test(
            (found,), np.mean, permutation_type="samples", alternative="greater", rng=np.random.default_rng(0)
        )
        return float(result.pvalue)
    return float(((_signs(len(found)) * found).mean(1) >= found.mean() - EQUAL).mean())


@cache
def _signs(count: int) -> np.ndarray:
    """All signs of ``count`` values, [2ⁿ, n]."""
    return np.array(list(itertools.product((1, -1), repeat=count)))


def flips(values: Sequence[float], low: float, high: float) -> float | None:
    """:func:`sign_flip` of a mean within [low, high], if that has one bound.

    >>> flips([1.0, 2.0, 3.0], 0, math.inf), flips([1.0, 2.0, 3.0], -math.inf, 0), flips([1.0], -1, 1)
    (0.125, 1.0, None)
    """
    if not values or (low > -math.inf and high < math.inf):
        return None
    return sign_flip(values, low) if high == math.inf else sign_flip([-value for value in values], -high)


def standard_error(values: Iterable[float]) -> float:
    """s/√n of at least two values.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    found = list(values)
    mean = math.fsum(found) / len(found)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1) / len(found))


def p_above(values: Sequence[float], bound: float) -> float:
    """The one-sided p-value of a mean above ``bound`` by Student's t; 1 for fewer than ``MIN_SEEDS`` values.

    It is valid for about normal values. Equal ones, which have no spread to judge by, count as by :func:`sign_flip`: 2⁻ⁿ above the bound, else 1.

    >>> round(p_above([1.0, 2.0, 3.0], 0.0), 4), p_above([1.0, 2.0], 0.0), p_above([1.0, 1.0, 1.0], 1.0), p_above([1.0, 1.0, 1.0], 0.0)
    (0.0371, 1.0, 1.0, 0.125)
    """
    if len(values) < MIN_SEEDS:
        return 1.0
    distance, error = sum(values) / len(values) - bound, standard_error(values)
    if error < EQUAL:
        return 0.5 ** len(values) if distance > EQUAL else 1.0
    return float(special.stdtr(len(values) - 1, -distance / error))


def p_below(values: Sequence[float], bound: float) -> float:
    """:func:`p_above` of a mean below ``bound``."""
    return p_above([-value for value in values], -bound)


def p_within(values: Sequence[float], low: float, high: float) -> float:
    """The p-value of a mean within [low, high] by two one-sided tests (TOST)."""
    return max(p_above(values, low) if low > -math.inf else 0.0, p_below(values, high) if high < math.inf else 0.0)


def p_outside(values: Sequence[float], low: float, high: float) -> float:
    """The p-value of a mean outside [low, high]: the smaller of two, doubled if there are two bounds, since either counts."""
    found = [p_below(values, low)] * (low > -math.inf) + [p_above(values, high)] * (high < math.inf)
    return min(1.0, len(found) * min(found))


def judged(what: str, low: float, high: float, values: Any, runs: Iterable[str], margin: float | None = None) -> Part:
    """A part that holds if the mean of ``values`` (a series over seeds) lies within [low, high], and fails if it lies outside.

    With a ``margin``, a part of one bound is equivalent where the mean lies within bound ± margin.
    """
    numbers = tuple(float(v) for v in pd.Series(values, dtype=float).dropna())
    equivalent = 1.0
    if margin is not None:
        bound = low if high == math.inf else high
        equivalent = p_within(numbers, bound - margin, bound + margin)
    return Part(
        what, relation(low, high), numbers, tuple(sorted(set(runs))),
        p_within(numbers, low, high), p_outside(numbers, low, high), equivalent, flips(numbers, low, high),
        tests=1 if math.inf in (-low, high) else 2, margin=margin,
    )  # fmt: skip


def relation(low: float, high: float) -> str:
    """The relation in words.

    >>> relation(0, math.inf), relation(-math.inf, 1), relation(-1, 1)
    ('> 0', '< 1', '-1 to 1')
    """
    return f"> {low:g}" if high == math.inf else f"< {high:g}" if low == -math.inf else f"{low:g} to {high:g}"


def at_every_level(what: str, low: float, high: float, gaps: pd.DataFrame, runs: Iterable[str]) -> Part:
    """A part that holds if the mean of every column of ``gaps`` [seeds, levels] lies within [low, high], and fails if one lies outside.

    That all lie within needs no correction over levels, since the worst one must (Berger 1982); that one lies outside is corrected by
    Bonferroni. The values are those of the level that makes it fail, or else of the one furthest out, which ``what`` then names.
    """
    found = zip(gaps.columns, gaps.to_numpy(dtype=float).T, strict=True)
    columns = {level: v[~np.isnan(v)].tolist() for level, v in found if not np.isnan(v).all()}
    levels = ", ".join(map(str, columns))
    wanted = f"{relation(low, high)} at every level{f' ({levels})' * bool(columns)}"
    if not columns:
        return Part(what, wanted, (), tuple(sorted(set(runs))))

    def out(level: Any) -> float:
        mean = sum(columns[level]) / len(columns[level])
        return max(low - mean, mean - high)

    p_holds = max(p_within(values, low, high) for values in columns.values())
    outside = {level: p_outside(values, low, high) for level, values in columns.items()}
    p_fails = min(1.0, len(columns) * min(outside.values()))
    flipped = [p for values in columns.values() if (p := flips(values, low, high)) is not None]
    worst = min(columns, key=outside.__getitem__) if p_fails <= ERROR else max(columns, key=out)
    return Part(
        f"{what}, worst at level {worst}", wanted, tuple(columns[worst]), tuple(sorted(set(runs))), p_holds, p_fails,
        p_flips=max(flipped, default=None), tests=len(columns) * (1 if math.inf in (-low, high) else 2),
    )  # fmt: skip


def above(what: str, values: Any, runs: Iterable[str], bound: float = 0.0, margin: float | None = None) -> Part:
    """A part that holds if the mean of ``values`` lies above ``bound``."""
    return judged(what, bound, math.inf, values, runs, margin)


def below(what: str, values: Any, runs: Iterable[str], bound: float = 0.0, margin: float | None = None) -> Part:
    """A part that holds if the mean of ``values`` lies below ``bound``."""
    return judged(what, -math.inf, bound, values, runs, margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): the chance that any of several true hypotheses is rejected stays below the level.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = most
    return adjusted


def corrected(parts: Sequence[Part]) -> list[Part]:
    """The parts with their verdicts, each of whose p-values is corrected by Holm over the parts of the claim for the same network."""
    found: dict[int, Part] = {}
    for network in dict.fromkeys(part.network for part in parts):
        own = [i for i, part in enumerate(parts) if part.network == network]
        kinds = {HOLDS: "p_holds", FAILS: "p_fails", EQUIVALENT: "p_equivalent"}
        adjusted = {verdict: holm([getattr(parts[i], name) for i in own]) for verdict, name in kinds.items()}
        for place, i in enumerate(own):
            verdict = next((v for v in kinds if adjusted[v][place] <= ERROR), UNKNOWN)
            found[i] = replace(parts[i], verdict=verdict, beside=len(own))
    return [found[i] for i in range(len(parts))]


def together(parts: Sequence[Part]) -> str:
    """The verdict of several parts: they hold if all do, fail if one does, and are equivalent if all others hold.

    That all hold needs no correction, since each must (Berger 1982): their own p-values count, not Holm's.

    >>> part = Part("x", "> 0", (1.0,), ())
    >>> sure, other = replace(part, p_holds=0.02), replace(part, p_fails=0.02)
    >>> together([sure, sure]), together([sure, part]), together([sure, other]), together([replace(other, p_fails=0.01), sure]), together([])
    ('holds', 'cannot tell', 'cannot tell', 'fails', 'cannot tell')
    """
    if not parts:
        return UNKNOWN
    if min(holm([part.p_fails for part in parts])) <= ERROR:
        return FAILS
    if max(part.p_holds for part in parts) <= ERROR:
        return HOLDS
    return EQUIVALENT if max(min(part.p_holds, part.p_equivalent) for part in parts) <= ERROR else UNKNOWN


def depth_slope(layers: pd.DataFrame) -> pd.Series:
    """Per seed how many more percent of its weights the last layer loses than the first, by the least-squares line of sparsity over depth.

    The convolutions of shortcuts are left out, since they have no depth of their own.
    """
    path = layers[~layers["site"].str.contains("shortcut|downsample")]
    found = {}
    for seed, rows in path.groupby("seed"):
        depth = rows["depth"] - rows["depth"].mean()
        slope = (depth * rows["sparsity"]).sum() / (depth**2).sum()
        found[seed] = 100 * slope * (depth.max() - depth.min())
    return pd.Series(found, dtype=float)


@dataclass(frozen=True, eq=False)
class Curve:
    """The finished levels of one kind of ticket of one network, over seeds."""

    frame: pd.DataFrame

    @property
    def runs(self) -> list[str]:
        return list(self.frame["run"].unique())

    def at(self, column: str, low: float = 0.0, high: float = 1.0) -> pd.Series:
        """Per seed the mean of ``column`` over the pruned levels whose density is in [low, high] and that all seeds have; NaN if one is NaN."""
        (whole,) = shared(self)
        low, high = low * (1 - ROUNDED), high * (1 + ROUNDED)
        rows = whole.frame[(whole.frame["level"] > 0) & whole.frame["density"].between(low, high)]
        return rows.groupby("seed")[column].agg(lambda values: values.mean(skipna=False))

    def dense(self, column: str) -> pd.Series:
        """Per seed ``column`` of the dense level."""
        return self.frame[self.frame["level"] == 0].set_index("seed")[column]

    def from_dense(self, column: str) -> pd.DataFrame:
        """The difference to the dense level by seed (rows) and pruned level (columns)."""
        values = self.by_level(column)
        if 0 not in values.columns:
            return values.iloc[:, :0]
        return values.drop(columns=0).sub(values[0], axis=0)

    def steps(self, column: str) -> pd.DataFrame:
        """The difference to the level before by seed (rows) and pruned level (columns)."""
        return self.by_level(column).diff(axis=1).iloc[:, 1:]

    def up_to(self, density: float) -> Curve:
        """The levels of at least this density."""
        return Curve(self.frame[self.frame["density"] >= density * (1 - ROUNDED)])

    def down_to(self, density: float) -> Curve:
        """The dense level and those of at most this density."""
        return Curve(self.frame[(self.frame["density"] <= density * (1 + ROUNDED)) | (self.frame["level"] == 0)])

    def sparsest(self, column: str) -> pd.Series:
        """Per seed ``column`` of the sparsest level that all seeds have finished."""
        (whole,) = shared(self)
        return whole.frame[whole.frame["level"] == whole.frame["level"].max()].set_index("seed")[column]

    def gaps(self, other: Curve, column: str) -> pd.DataFrame:
        """The difference to ``other`` by seed (rows) and pruned level (columns), where both have the level for every seed that they share."""
        both = (self.by_level(column) - other.by_level(column)).dropna(how="all")
        return both.loc[:, [level for level in both.columns if level > 0 and both[level].notna().all()]]

    def by_level(self, column: str) -> pd.DataFrame:
        """``column`` by seed (rows) and level (columns)."""
        return self.frame.pivot_table(index="seed", columns="level", values=column)

    def ahead_of(self, other: Curve, column: str, low: float = 0.0, high: float = 1.0) -> pd.Series:
        """Per seed the mean difference to ``other`` over the pruned levels in [low, high] that both have for every seed."""
        mine, others = shared(self, other)
        both = mine.frame.merge(others.frame, on=["seed", "level"], suffixes=("", "_other"))
        return Curve(both.assign(difference=both[column] - both[f"{column}_other"])).at("difference", low, high)


def shared(*curves: Curve) -> list[Curve]:
    """The curves with the seeds that all of them have, and the levels that all of them have for each of these seeds."""
    seeds = set.intersection(*(set(curve.frame["seed"]) for curve in curves))
    found = [Curve(curve.frame[curve.frame["seed"].isin(seeds)]) for curve in curves]
    counts = [curve.frame.groupby("level")["seed"].nunique() for curve in found]
    levels = set.intersection(*(set(count.index[count == len(seeds)]) for count in counts))
    return [Curve(curve.frame[curve.frame["level"].isin(levels)]) for curve in found]
