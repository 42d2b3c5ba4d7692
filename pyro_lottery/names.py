"""Tensors by name: those under a prefix, groups of them, and checks that names and shapes agree and that values are finite."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from pyro_lottery.errors import UserError

T = TypeVar("T")
GROUPS = ("mask", "loc", "scale", "net", "guide")
"""The groups of tensors in a ticket or posterior: what is pruned, the posterior by site, the network's other state, and what else a guide has."""
LIKELIHOOD = "likelihood/"
"""Prefix of the model's parameters that do not belong to the network, such as a learned noise scale."""
LISTED = 5
"""Maximum number of differences that an error lists; the others are only counted."""


def under(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    """The entries of ``named`` whose names start with ``prefix``, by the rest of the name.

    >>> under("loc/", {"loc/a": 1, "scale/a": 2})
    {'a': 1}
    """
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def joined(groups: Mapping[Any, Mapping[str, T]]) -> dict[str, T]:
    """Tensors of several groups under one name each, as they are in a file.

    >>> joined({"loc": {"a": 1}, "net": {"b": 2}})
    {'loc/a': 1, 'net/b': 2}
    """
    return {f"{group}/{name}": value for group, sites in groups.items() for name, value in sites.items()}


def grouped(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What :func:`joined` was given, and an empty group for each of ``GROUPS`` that is missing.

    >>> grouped({"loc/a": 1, "other/b": 2})
    {'mask': {}, 'loc': {'a': 1}, 'scale': {}, 'net': {}, 'guide': {}, 'other': {'b': 2}}
    """
    groups: dict[str, dict[str, T]] = {group: {} for group in GROUPS}
    for key, value in named.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups


def can_be_shown(name: str) -> bool:
    """Whether a name can be printed: it holds no control characters, ends of lines, or marks that turn the direction of writing.

    >>> can_be_shown("café\u00a0noir"), can_be_shown("dog\\n")
    (True, False)
    """
    joiners = "\u200c\u200d"  # of Persian and Hindi, and of emoji
    return all(c.isprintable() or c in joiners or unicodedata.category(c) == "Zs" for c in name)


def check_same(
    given: Mapping[str, Any],
    wanted: Mapping[str, Any],
    where: str = "",
    whose: str = "network",
    prefix: str = "",
    error: type[Exception] = UserError,
) -> None:
    """Raise ``error`` unless ``given`` and ``wanted`` have the same names and shapes.

    Values are tensors or shapes. The message starts with ``where`` ("the ticket is of another network: ") and lists the
    differences; ``prefix`` ("loc/") precedes each name, and ``whose`` says what ``wanted`` belongs to.

    >>> check_same({"a": (2,), "c": (1,)}, {"a": (3,), "b": (1,)})
    Traceback (most recent call last):
    pyro_lottery.errors.UserError: a is (2,), but the network's is (3,); b is missing; c is not in the network
    """
    found = []
    for name in dict.fromkeys([*wanted, *given]):
        if name not in given:
            found.append(f"{prefix}{name} is missing")
        elif name not in wanted:
            found.append(f"{prefix}{name} is not in the {whose}")
        elif (ours := _shape(given[name])) != (theirs := _shape(wanted[name])):
            found.append(f"{prefix}{name} is {ours}, but the {whose}'s is {theirs}")
    if found:
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise error(f"{where}{'; '.join(found[:LISTED])}{more}")


def check_finite(given: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise ``UserError`` if a tensor of ``given`` holds an infinite or NaN value that ``own`` does not hold at the same place.

    A network may hold infinite values itself, for example in an attention mask. Values are first converted to the dtype of
    ``own``: a number that fits double precision may become infinite in single precision. ``prefix`` precedes the name.
    """
    for name, value in own.items():
        new = given[name].to(value)
        if not (new.isfinite() | (new == value)).all():
            raise UserError(f"{prefix}{name} holds values that are not finite")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", value))
