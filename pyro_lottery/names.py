"""Two collections of tensors compared: their names and shapes, and whether their values are finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_lottery.errors import UserError

LIKELIHOOD = "likelihood/"
"""The prefix of the names in a model's state that are not its network's, as a learned noise scale."""
LISTED = 5
"""Differences that an error names; it counts further ones."""


def check_same(
    given: Mapping[str, Any],
    wanted: Mapping[str, Any],
    where: str = "",
    whose: str = "network",
    prefix: str = "",
    error: type[Exception] = UserError,
) -> None:
    """Raise one ``error`` that names the differences between ``given`` and what ``whose`` has, tensors or shapes by name.

    ``where`` goes before the list ("the ticket is of another network: "), ``prefix`` before each name ("loc/").

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
    """Raise ``UserError`` for a value that is not finite, unless ``own`` has it too, as an attention mask has from the start.

    Values are compared in the dtype of ``own``, in which a large number of double precision is infinite. ``prefix`` goes
    before the name.
    """
    for name, value in own.items():
        new = given[name].to(value)
        if not (new.isfinite() | (new == value)).all():
            raise UserError(f"{prefix}{name} holds values that are not finite")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", value))
