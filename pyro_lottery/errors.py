"""Exceptions of the library; each message is one line that says what is wrong and what would be right."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NoReturn


class UserError(ValueError):
    """Bad input; the command line prints the message and exits with 2."""

    def __init__(self, message: str):
        # Pyro appends a table of shapes to an error raised inside a model; it is cut off here.
        super().__init__(re.split(r"\n\s*Trace Shapes:", message)[0])


class Busy(UserError):
    """Another process is using the run folder."""


class NotShared(UserError):
    """Level 0 of another run cannot be copied: it is another one, not finished, or damaged."""


class Diverged(RuntimeError):
    """The loss or a parameter became infinite or NaN during training.

    ``epoch`` and ``step`` say where, ``sites`` lists the affected sites.
    """

    def __init__(self, message: str, epoch: int, step: int, sites: Sequence[str]):
        super().__init__(message)
        self.epoch, self.step, self.sites = epoch, step, list(sites)


class Stopped(Exception):
    """A signal stopped the run after everything was saved; the command line exits with 75."""


class Failed(Exception):
    """A run failed, or its ranks disagree; the command line exits with 1."""


class Damaged(Exception):
    """A file fails its checksum or cannot be read."""


class OneLineParser(argparse.ArgumentParser):
    """A parser of command lines that reports an error in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty.

    >>> one_line(ValueError("one\\ntwo")), one_line(MemoryError())
    ('one', 'MemoryError')
    """
    return str(error).strip().split("\n")[0] or type(error).__name__


def check_counts(least: int, **counts: Any) -> None:
    """Raise ``UserError`` for a value that is not a whole number of at least ``least``.

    >>> check_counts(1, epochs=2.5)
    Traceback (most recent call last):
    pyro_lottery.errors.UserError: epochs must be a whole number, at least 1, got 2.5
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number, at least {least}, got {value!r}")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return a ``UserError`` for a ``name`` of this ``kind``, say ``--arch``, that is not ``known``; it suggests close matches first.

    >>> str(unknown("--arch", "resnet19", ["vgg11", "resnet18"]))
    "unknown --arch 'resnet19': did you mean resnet18? Known: vgg11 resnet18"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f": did you mean {' or '.join(near)}? Known:" if near else "; known:"
    listed = " ".join(known[:20]) + (" ..." if len(known) > 20 else "")
    return UserError(f"unknown {kind} {name!r}{hint} {listed}")
