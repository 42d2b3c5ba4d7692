"""What every command does alike: signals that ask to stop, one line for what went wrong, and the exit codes."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pyro_lottery import kernels
from pyro_lottery.errors import Damaged, Diverged, Failed, Stopped, UserError
from pyro_lottery.ranks import is_first

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Windows has no SIGUSR1."""


class Received(list[int]):
    """Signals that asked to stop. Outside :meth:`heeded` nothing is unsaved, and one raises ``Stopped`` wherever it comes."""

    _heeded = 0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """The caller looks at the list, and stops when it has saved what it does."""
        self._heeded += 1
        try:
            yield
        finally:
            self._heeded -= 1

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within :meth:`heeded`, what can be interrupted, since all before it is saved."""
        if self:
            raise Stopped
        heeded, self._heeded = self._heeded, 0
        try:
            yield
        finally:
            self._heeded = heeded

    def note(self, number: int, frame: Any) -> None:
        """Python's handler of a signal."""
        if number == signal.SIGINT and number in self:
            raise KeyboardInterrupt
        self.append(number)
        if not self._heeded:
            raise Stopped


@contextmanager
def signals() -> Iterator[Received]:
    """What comes of SIGTERM, SIGINT and SIGUSR1 (a cluster's warning before its time limit); a second SIGINT interrupts at
    once.
    """
    known = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(known, Received):  # of a caller, which must hear of what comes too
        yield known
        return
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets the main thread alone handle signals
        return
    before = {number: signal.signal(number, received.note) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(prog: str, work: Callable[[], Any], arguments: Sequence[str] | None = None) -> int:
    """Do ``work``; returns the exit code: 0 finished, 2 bad input, 75 stopped with everything saved, 130 interrupted by a
    second SIGINT, 1 otherwise.

    Warnings and errors become one line each on stderr that begins with ``prog``; that of a stop ends with the command
    that goes on, ``prog`` and its ``arguments`` (those of the process).
    """

    def complain(text: object) -> None:
        if not is_first():
            return
        line = str(text).split("\n")[0]  # Pyro adds its trace's shapes to what goes wrong within
        print(f"{prog}: {line}", file=sys.stderr)

    kernels.keep_memory()  # training is quicker by a twentieth, evaluation by a fifth: the process is the command's own
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: complain(f"warning: {message}")
        try:
            work()
        except UserError as error:
            complain(error)
            return 2 if is_first() else 0  # or whoever started the ranks would end them all
        except Stopped:
            again = shlex.join(sys.argv[1:] if arguments is None else arguments)
            complain(f"stopped, everything is saved; to go on: {prog} {again}")
            return 75 if is_first() else 0
        except KeyboardInterrupt:
            complain("interrupted; what was saved is whole, and the same command goes on from there")
            return 130
        # Anything else is not foreseen, and its traceback is needed.
        except (Diverged, Damaged, Failed, OSError) as error:
            complain(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error)
            return 1
    return 0
