"""Priors by their command-line names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pyro_lottery.errors import unknown
from pyro_lottery.priors.by_site import AnyPrior, Prior
from pyro_lottery.priors.families import fan_in, laplace, mixture, normal, student_t
from pyro_lottery.untrusted import load_callable

KINDS: dict[str, Callable[[float], Prior]] = {
    "normal": normal, "laplace": laplace, "student_t": student_t, "mixture": mixture, "fan_in": fan_in,
}  # fmt: skip
"""Priors by their command-line names; each takes a scale."""


def by_name(name: str, scale: float) -> AnyPrior:
    """A prior from its command-line name and ``scale``, or from an import path of a function or of a dict of globs.

    Raises ``UserError`` if the name is unknown, or if the import fails.
    """
    if name in KINDS:
        return KINDS[name](scale)
    if "." not in name and ":" not in name:
        raise unknown("--prior", name, [*KINDS, "package.module.function"])
    return load_callable(name, "--prior", Mapping)
