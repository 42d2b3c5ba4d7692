"""What can go wrong, as exceptions whose text is one line that says what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the command line prints its one line and exits with 2."""


class Busy(UserError):
    """Another process is at work in a run folder."""


class Diverged(RuntimeError):
    """Training met a loss that is not finite."""


class Stopped(Exception):
    """A signal asked to stop; everything is saved and the command line exits with 75."""


class Failed(Exception):
    """Some runs of a study failed; the others are finished."""


class Damaged(Exception):
    """A file fails its checksum or cannot be read."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not among ``known``, with near matches first.

    >>> str(unknown("arch", "resnet19", ["vgg11", "resnet18"]))
    "unknown arch 'resnet19': did you mean resnet18? Known: vgg11 resnet18"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    listed = " ".join(known[:20]) + (" ..." if len(known) > 20 else "")
    return UserError(f"unknown {kind} {name!r}: {hint}Known: {listed}")
