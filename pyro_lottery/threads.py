"""Locks for threads, which share Pyro's stack of handlers, torch's generators and a network's modes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK

from pyro_lottery.errors import UserError

TURN = threading.RLock()
"""Lock held during each draw of a prediction and each training step, but never while a generator waits for its caller."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class OwnHandler(Messenger):
    """A Pyro handler that acts only on the thread that entered it, although all threads share Pyro's stack of handlers."""

    _thread: int | None = None

    def __enter__(self) -> Any:
        with TURN:  # another thread may be iterating over the stack
            entered = super().__enter__()
            self._thread = threading.get_ident()
            return entered

    def __exit__(self, *exception: Any) -> None:
        with TURN:
            mine = _PYRO_STACK.index(self) if self in _PYRO_STACK else len(_PYRO_STACK)
            for other in [h for h in _PYRO_STACK[mine:] if isinstance(h, OwnHandler) and h._thread != self._thread]:
                # Pyro removes only the top handler. Another thread's handler above this one is still in use: move it below.
                _PYRO_STACK.remove(other)
                _PYRO_STACK.insert(_PYRO_STACK.index(self), other)
            super().__exit__(*exception)

    def _process_message(self, msg: Any) -> None:
        if self._thread == threading.get_ident():
            super()._process_message(msg)
        elif self._thread == threading.main_thread().ident and self._concerns(msg) and not _has_own():
            raise UserError(
                f"site {msg['name'] or msg['args'][0]!r}: the main thread entered a handler, which acts only on that thread; "
                f"enter it in the thread that predicts or trains, or enter sparsify({{}}) there for no mask"
            )

    def _postprocess_message(self, msg: Any) -> None:
        if self._thread == threading.get_ident():
            super()._postprocess_message(msg)

    def _concerns(self, msg: Any) -> bool:
        """Return whether this handler would change the message."""
        raise NotImplementedError


def _has_own() -> bool:
    return any(isinstance(h, OwnHandler) and h._thread == threading.get_ident() for h in list(_PYRO_STACK))


def in_one_thread(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate ``function`` so that it raises ``UserError`` while another thread is running it."""
    running = threading.RLock()

    @functools.wraps(function)
    def alone(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not running.acquire(blocking=False):
            raise UserError(
                f"another thread is running {function.__name__}, and threads share one random state; use processes instead"
            )
        try:
            return function(*args, **kwargs)
        finally:
            running.release()

    return alone


def in_turn(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate ``function`` so that it holds :data:`TURN`: one thread at a time runs a model."""

    @functools.wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with TURN:
            return function(*args, **kwargs)

    return waiting
