"""Parameters that stay in their modules instead of Pyro's global store, while this package's models and guides run."""

from __future__ import annotations

import weakref
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
    """Give each recorded parameter the method ``unconstrained()``, which ``pyro.infer.SVI`` and ``pyro.optim`` call."""

    def _pyro_param(self, msg: Any) -> None:
        value = msg["args"][1] if len(msg["args"]) > 1 else None
        if value is not None and msg["value"] is None and not hasattr(value, "unconstrained"):
            # The method is set on a view: a weak reference on the parameter itself would make it impossible to pickle.
            view = value.view_as(value)
            view.unconstrained = weakref.ref(value)
            msg["value"], msg["done"] = view, True


class OwnParameters(_Context):
    """The context that Pyro enters around each call of a PyroModule, which here keeps parameters in the module only.

    Pyro keeps the parameters of all PyroModules in one global store by name, so two networks with the same site names would
    share them. Its setting ``module_local_params`` turns this off, but for the whole process and every model in it. This
    context turns the setting on when it is entered and restores it when it is left. A ``pyro.param`` statement in a
    network's own code still uses the global store, as everywhere in Pyro.
    """

    def __init__(self) -> None:
        super().__init__()
        self.param_state = {"params": {}, "constraints": {}}  # Pyro sets this only if module_local_params is on

    def __enter__(self) -> None:
        global _inside, _before
        TURN.acquire()  # threads share Pyro's settings and handlers, and this context
        if not self.active:
            if not _inside:
                _before = pyro.settings.get("module_local_params")
                pyro.settings.set(module_local_params=True)
            _inside += 1
            self._handler = _Unconstrained()
            self._handler.__enter__()
        # super().__enter__() is not called: it replaces the global store during the call, and then the optimizer of an
        # outer guide no longer finds the parameters that the guide has just read.
        self.active += 1
        self.used = True

    def __exit__(self, *exception: Any) -> None:
        global _inside
        try:
            self.active -= 1
            if not self.active:
                self.cache.clear()
                _inside -= 1
                if not _inside:
                    pyro.settings.set(module_local_params=_before)
                self._handler.__exit__(*exception)  # raises if another thread entered a handler of Pyro out of turn
        finally:
            TURN.release()  # or every other thread would wait for ever


def keep_parameters_(module: nn.Module) -> None:
    """Let ``module`` and every PyroModule in it keep their parameters out of Pyro's global store, in place."""
    context = OwnParameters()
    for part in module.modules():
        if isinstance(part, PyroModule):
            part._pyro_context = context
