"""What every command does alike: signals that ask to stop, one line for what went wrong, and the exit codes."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro_lottery.errors import Damaged, Diverged, Failed, Stopped, UserError


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that fills when SIGTERM or SIGINT asks to stop; a second SIGINT interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets the main thread alone handle signals
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(prog: str, work: Callable[[], Any]) -> int:
    """Do ``work``; returns the exit code: 0 finished, 2 bad input, 75 stopped with everything saved, 1 otherwise.

    Warnings and errors become one line each on stderr that begins with ``prog``.
    """

    def complain(text: object) -> None:
        line = str(text).split("\n")[0]  # Pyro adds its trace's shapes to what goes wrong within
        print(f"{prog}: {line}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: complain(f"warning: {message}")
        try:
            work()
        except UserError as error:
            complain(error)
            return 2
        except Stopped:
            complain("stopped, everything is saved; repeat the command to go on")
            return 75
        except (
            Diverged,
            Damaged,
            Failed,
            OSError,
        ) as error:  # anything else is not foreseen, and its traceback is needed
            complain(error)
            return 1
    return 0
