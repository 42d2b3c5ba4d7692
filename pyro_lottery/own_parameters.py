"""Parameters that stay in their modules: what this package's networks and guides do to Pyro, and only while they run."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import _Context
from pyro.poutine.messenger import Messenger
from torch import nn

from pyro_lottery.threads import TURN

_inside = 0
_before = False


class _Unconstrained(Messenger):
    """Gives a recorded parameter what ``pyro.infer.SVI`` and ``pyro.optim`` ask of it: ``value.unconstrained()``."""

    def _pyro_param(self, msg: Any) -> None:
        value = msg["args"][1] if len(msg["args"]) > 1 else None
        if value is not None and msg["value"] is None and not hasattr(value, "unconstrained"):
            # On a view, since a weak reference on the parameter itself could not be pickled with it.
            view = value.view_as(value)
            view.unconstrained = weakref.ref(value)
            msg["value"], msg["done"] = view, True


class OwnParameters(_Context):
    """The context that Pyro enters around each call of a PyroModule, with its parameters in the module alone.

    Pyro keeps every PyroModule's parameters in one global store under their names, so that two networks with the same
    site names would share theirs. Its setting ``module_local_params`` turns that off for the whole process, also for
    models that are none of ours. Here it is on while this context is entered, and as it was outside. A ``pyro.param`` that
    a network's own code states goes to the global store, as everywhere in Pyro.
    """

    def __init__(self) -> None:
        super().__init__()
        self.param_state = {"params": {}, "constraints": {}}  # which Pyro's own has only if the setting is on

    def __enter__(self) -> None:
        global _inside, _before
        TURN.acquire()  # threads share Pyro's settings and handlers, and this module's context
        if not self.active:
            if not _inside:
                _before = pyro.settings.get("module_local_params")
                pyro.settings.set(module_local_params=True)
            _inside += 1
            self._handler = _Unconstrained()
            self._handler.__enter__()
        # Not by super(): Pyro's own swaps the global store for the call, and the parameters in it, which an outer guide
        # has just read, lose what its optimizer looks them up by.
        self.active += 1
        self.used = True

    def __exit__(
        self,
        type: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _inside
        self.active -= 1
        if not self.active:
            self.cache.clear()
            self._handler.__exit__(type, value, traceback)
            del self._handler
            _inside -= 1
            if not _inside:
                pyro.settings.set(module_local_params=_before)
        TURN.release()


def keep_parameters_(module: nn.Module) -> None:
    """Let ``module`` and every PyroModule in it keep their parameters to themselves from now on, in place."""
    context = OwnParameters()
    for part in module.modules():
        if isinstance(part, PyroModule):
            part._pyro_context = context
