"""What can go wrong, as exceptions whose text is one line that says what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Bad input: the command line prints its one line and exits with 2."""

    def __init__(self, message: str):
        # Without the lines that Pyro adds to what is raised within a model.
        super().__init__(re.split(r"\n\s*Trace Shapes:", message)[0])


class Busy(UserError):
    """Another process is at work in a run folder."""


class Diverged(RuntimeError):
    """Training met a loss or a parameter that is not finite."""

    def __init__(self, message: str, epoch: int, step: int, sites: Sequence[str]):
        super().__init__(message)
        self.epoch, self.step, self.sites = epoch, step, list(sites)


class Stopped(Exception):
    """A signal asked to stop; everything is saved and the command line exits with 75."""


class Failed(Exception):
    """Some runs of a study failed; the others are finished."""


class Damaged(Exception):
    """A file fails its checksum or cannot be read."""


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing.

    >>> one_line(ValueError("one\\ntwo")), one_line(MemoryError())
    ('one', 'MemoryError')
    """
    return str(error).strip().split("\n")[0] or type(error).__name__


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
