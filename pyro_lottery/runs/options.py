"""One option: its type, help text and allowed values, and the check of a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, field
from numbers import Integral, Real
from typing import Any

from pyro_lottery import data
from pyro_lottery.errors import UserError, unknown

Check = tuple[Callable[[Any], bool], str]
"""A test of a value, and what the value must be to pass it."""
POSITIVE: Check = (lambda v: v > 0, "greater than 0")
AT_LEAST_1: Check = (lambda v: v >= 1, "at least 1")
AT_LEAST_0: Check = (lambda v: v >= 0, "at least 0")
FRACTION: Check = (lambda v: 0 < v < 1, "between 0 and 1, both excluded")
HALF_OPEN: Check = (lambda v: 0 <= v < 1, "from 0 to below 1")
RISING: Check = (lambda v: all(a >= 1 for a in v) and list(v) == sorted(set(v)), "increasing epochs, each at least 1")


def option(
    default: Any,
    kind: type,
    text: str,
    check: Check | None = None,
    choices: Sequence[str] | None = None,
    many: bool = False,
    words: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Any:
    """A dataclass field for an option of type ``kind``, or of a tuple of them with ``many``, or one of ``words``; ``text`` is its help, and ``also`` has its other
    names on the command line."""
    meta = {
        "kind": kind,
        "help": text,
        "check": check,
        "choices": choices,
        "many": many,
        "words": tuple(words),
        "also": tuple(also),
    }
    return field(default=default, metadata=meta)


_KINDS = {
    int: "a whole number", float: "a number of magnitude below 2**63", bool: "True or False", str: "text without control characters",
}  # fmt: skip


def checked(option: Field[Any], value: Any) -> Any:
    """``value`` converted to the type of ``option``; raises ``UserError`` if it has another type, or is not allowed."""
    meta, name = option.metadata, f"--{dashed(option.name)}"
    if value is None and option.default is None:
        return None
    if isinstance(value, str) and value in meta["words"]:
        return value
    try:
        value = tuple(_typed(v, meta["kind"]) for v in value) if meta["many"] else _typed(value, meta["kind"])
    except (TypeError, ValueError, OverflowError):
        expected = f"{'a list of ' if meta['many'] else ''}{_KINDS[meta['kind']]}" + "".join(
            f", or {w}" for w in meta["words"]
        )
        raise UserError(f"{name} must be {expected}, got {value!r}") from None
    if meta["choices"] and value not in meta["choices"] and (option.name, value) != ("dataset", data.OWN):
        raise unknown(name, str(value), meta["choices"])
    if meta["check"] and not meta["check"][0](value):
        raise UserError(f"{name} must be {meta['check'][1]}, got {as_text(value)}")
    return value


def _typed(value: Any, kind: type) -> Any:
    """``value`` as a ``kind``; raises ``TypeError`` or ``ValueError`` for another type, which a config.json may hold."""
    if kind is str:
        if not isinstance(value, str) or any(c < " " for c in value):
            raise TypeError
        value.encode()  # fails for the undecodable bytes of a broken file name
    elif kind is bool:
        if not isinstance(value, bool):
            raise TypeError
    elif isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise TypeError
    elif not -(2**63) < float(value) < 2**63:  # rejects NaN, infinity and integers that torch cannot hold
        raise ValueError
    return kind(value)


def dashed(name: str) -> str:
    """An option's name as the command line spells it."""
    return name.replace("_", "-")


def as_text(value: Any) -> str:
    """An option's value as the command line spells it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
