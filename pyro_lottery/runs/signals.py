"""Signals that ask a command to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro_lottery.errors import Stopped

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
