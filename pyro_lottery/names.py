"""Names and shapes of two collections of tensors, compared in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_lottery.errors import UserError

LIKELIHOOD = "likelihood/"
"""What the names of a model's state begin with that is not its network's: a learned noise scale, say."""
LISTED = 5
"""Differences that an error names; of further ones it says how many."""


def check_same(given: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "", whose: str = "network") -> None:
    """Raise one ``UserError`` that names what differs between ``given`` and what ``whose`` has, tensors or shapes by name.

    ``where`` goes before the list: "the ticket is of another network: ".

    >>> check_same({"a": (2,), "c": (1,)}, {"a": (3,), "b": (1,)})
    Traceback (most recent call last):
    pyro_lottery.errors.UserError: a is (2,), but the network's is (3,); b is missing; c is not in the network
    """
    found = []
    for name in dict.fromkeys([*wanted, *given]):
        if name not in given:
            found.append(f"{name} is missing")
        elif name not in wanted:
            found.append(f"{name} is not in the {whose}")
        elif (ours := _shape(given[name])) != (theirs := _shape(wanted[name])):
            found.append(f"{name} is {ours}, but the {whose}'s is {theirs}")
    if found:
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise UserError(f"{where}{'; '.join(found[:LISTED])}{more}")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", value))
