"""Threads: Pyro's stack of handlers, torch's generators and a network's modes exist once for all of them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK

from pyro_lottery.errors import UserError

TURN = threading.RLock()
"""Held through each draw of a prediction and each step of training; never while a generator waits for its caller."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class OwnHandler(Messenger):
    """A handler that acts on the thread that has entered it alone, though Pyro's stack holds those of all threads."""

    _thread: int | None = None

    def __enter__(self) -> Any:
        with TURN:  # not while another thread goes through the stack
            entered = super().__enter__()
            self._thread = threading.get_ident()
            return entered

    def __exit__(self, *exception: Any) -> None:
        with TURN:
            mine = _PYRO_STACK.index(self) if self in _PYRO_STACK else len(_PYRO_STACK)
            for other in [h for h in _PYRO_STACK[mine:] if isinstance(h, OwnHandler) and h._thread != self._thread]:
                _PYRO_STACK.remove(other)  # entered later, and left later too: Pyro lets only the last one go
                _PYRO_STACK.insert(_PYRO_STACK.index(self), other)
            super().__exit__(*exception)

    def _process_message(self, msg: Any) -> None:
        if self._thread == threading.get_ident():
            super()._process_message(msg)
        elif self._thread == threading.main_thread().ident and self._concerns(msg) and not _has_own():
            raise UserError(
                f"site {msg['name'] or msg['args'][0]!r}: the main thread is within a handler, which acts on that thread "
                f"alone; enter it in the thread that predicts or trains, or sparsify({{}}) for no mask"
            )

    def _postprocess_message(self, msg: Any) -> None:
        if self._thread == threading.get_ident():
            super()._postprocess_message(msg)

    def _concerns(self, msg: Any) -> bool:
        """Whether this handler would have changed the message."""
        raise NotImplementedError


def _has_own() -> bool:
    return any(isinstance(h, OwnHandler) and h._thread == threading.get_ident() for h in list(_PYRO_STACK))


def in_one_thread(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, which raises ``UserError`` where another thread is in it."""
    running = threading.RLock()

    @functools.wraps(function)
    def alone(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not running.acquire(blocking=False):
            raise UserError(
                f"another thread is in {function.__name__}, and random numbers are the process's; use processes"
            )
        try:
            return function(*args, **kwargs)
        finally:
            running.release()

    return alone


def in_turn(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, for which other threads wait that are to run models too."""

    @functools.wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with TURN:
            return function(*args, **kwargs)

    return waiting
