"""Stop signals: they end a command at once, or after it has saved its work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro_lottery.errors import Stopped

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""The stop signals that this system has; Windows has no SIGUSR1."""


class Received(list[int]):
    """The stop signals received so far.

    A signal raises ``Stopped`` where it arrives, except within :meth:`heeded`, where there is unsaved work.
    """

    _heeded = 0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """A context in which signals are only listed: the caller checks the list, saves its work and stops by itself."""
        self._heeded += 1
        try:
            yield
        finally:
            self._heeded -= 1

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context within :meth:`heeded` in which signals raise ``Stopped`` again, because everything is saved."""
        if self:
            raise Stopped
        heeded, self._heeded = self._heeded, 0
        try:
            yield
        finally:
            self._heeded = heeded

    def note(self, number: int, frame: Any) -> None:
        """The handler that is registered for each signal; a second SIGINT raises ``KeyboardInterrupt``."""
        if number == signal.SIGINT and number in self:
            raise KeyboardInterrupt
        self.append(number)
        if not self._heeded:
            raise Stopped


@contextmanager
def signals() -> Iterator[Received]:
    """Collect SIGTERM, SIGINT and SIGUSR1 (a cluster's warning before its time limit) in a :class:`Received`.

    Within another such context, yields the same list. Outside the main thread, collects nothing.
    """
    known = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(known, Received):  # an outer context, whose owner must see the signals too
        yield known
        return
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows signal handlers only in the main thread
        return
    before = {number: signal.signal(number, received.note) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
