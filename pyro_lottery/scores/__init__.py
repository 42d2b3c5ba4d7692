"""Pruning scores (paper §5): the lowest-scoring weights are pruned.

A score is a function ``score(posterior)`` or ``score(posterior, context)`` that returns one tensor per site, of the site's shape. A
:class:`Context` gives the prior, the network, batches of training data and gradients. A score that says which weights are worth
nothing, so that no density has to be chosen, has an attribute ``threshold``: weights below it go.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pyro_lottery import seeds
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.scores.before_training import grasp, initial_magnitude, snip, synflow
from pyro_lottery.scores.context import Context
from pyro_lottery.scores.evidence import savage_dickey
from pyro_lottery.scores.posterior import (
    log_alpha,
    magnitude,
    mean_over_variance,
    random,
    snr,
    squared_sum,
    squared_sum_log_scale,
)
from pyro_lottery.types import Posterior, Sites
from pyro_lottery.untrusted import load_callable

__all__ = [
    "SCORES", "WITH_THRESHOLD", "Context", "Score", "by_name", "grasp", "initial_magnitude", "log_alpha", "magnitude", "mean_over_variance", "random", "ranks",
    "savage_dickey", "snip", "snr", "squared_sum", "squared_sum_log_scale", "synflow", "takes_context", "threshold_of",
]  # fmt: skip

Score = Callable[[Posterior], Sites] | Callable[[Posterior, Context], Sites]

SCORES: dict[str, Score] = {
    f.__name__: f
    for f in (
        snr, magnitude, squared_sum, mean_over_variance, squared_sum_log_scale, log_alpha, savage_dickey, initial_magnitude, snip,
        grasp, synflow, random,
    )
}  # fmt: skip
"""Scores by their names on the command line."""
_THRESHOLDS: dict[Any, float] = {savage_dickey: 0.0, log_alpha: -3.0}
WITH_THRESHOLD = tuple(f.__name__ for f in _THRESHOLDS)
"""Names of the scores that say which weights are worth nothing."""


def by_name(name: str, seed: int = 0, level: int = 0) -> Score:
    """A score from its command-line name or import path; ``random`` uses new noise at every level.

    Raises ``UserError`` if the name is unknown, or if the import fails.
    """
    if name == "random":
        return partial(random, seed=seeds.derive(seed, "score", level))
    if name in SCORES:
        return SCORES[name]
    if "." not in name and ":" not in name:
        raise unknown("--score", name, [*SCORES, "package.module.function"])
    return load_callable(name, "--score")


def takes_context(score: Score) -> bool:
    """Whether ``score`` is a function of a posterior and a :class:`Context`: it needs two arguments, or has one called ``context``.

    >>> takes_context(snr), takes_context(savage_dickey)
    (False, True)
    """
    try:
        every = inspect.signature(score).parameters
    except (TypeError, ValueError):  # of C functions
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return "context" in every or sum(p.default is p.empty and p.kind in positional for p in every.values()) == 2


def ranks(score: Score, posterior: Posterior, context: Context) -> Sites:
    """The value of ``score``, which sees ``context`` if it takes one; both are copies, since a score may change them in place."""
    chosen: Any = score
    posterior = _copied(posterior)
    if not takes_context(score):
        return chosen(posterior)
    context = replace(context, dense=replace(context.dense, start=_copied(context.dense.start)))
    named = inspect.signature(score).parameters.get("context")
    if named is None or named.kind is named.POSITIONAL_ONLY:
        return chosen(posterior, context)
    return chosen(posterior, context=context)


def _copied(posterior: Posterior) -> Posterior:
    def copies(sites: Sites | None) -> Any:
        return None if sites is None else {name: value.clone() for name, value in sites.items()}

    return replace(posterior, loc=copies(posterior.loc), scale=copies(posterior.scale))


def threshold_of(score: Score) -> float | None:
    """The score below which weights are worth nothing, or None if ``score`` only ranks them. Raises ``UserError`` unless it is a number."""
    found = getattr(score, "threshold", None)
    found = next(
        (value for known, value in _THRESHOLDS.items() if known is score), found
    )  # a score need not have a hash
    if found is None:
        return None
    try:
        number = float(found)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"the threshold of a score must be a number, got {found!r}")
    return number
