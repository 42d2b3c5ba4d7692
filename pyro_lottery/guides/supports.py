"""Supports of sites, and their maps from the real numbers."""

from __future__ import annotations

from typing import Any

from pyro.distributions import constraints
from torch.distributions import Transform, biject_to

from pyro_lottery.errors import UserError


def transform_of(site: str, distribution: Any) -> Transform | None:
    """The map from the real numbers to a site's support; None if the support is all real numbers."""
    if _base_constraint(distribution) is constraints.real:
        return None
    try:
        return biject_to(distribution.support)
    except NotImplementedError as error:
        raise UserError(
            f"site {site!r} is over {distribution.support}, to which no map from the real numbers is known; if it is "
            "discrete, enumerate it and hide it from the guide with pyro.poutine.block"
        ) from error


def _base_constraint(distribution: Any) -> Any:
    support = distribution.support
    while hasattr(support, "base_constraint"):  # of an independent one, or of a mixture
        support = support.base_constraint
    return support


def check_real(site: str, distribution: Any) -> None:
    """Raise ``UserError`` for a distribution that is not over all real numbers."""
    support = _base_constraint(distribution)
    if support is not constraints.real:
        raise UserError(
            f"the prior of {site!r} is over {support}, not all real numbers, and a pruned weight must be able to be 0; "
            "choose a prior like normal, laplace or student_t"
        )
