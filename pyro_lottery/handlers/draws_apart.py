"""``DrawsApart``: finds the sites of a guide whose draws neither depend on other sites' values nor feed into other sites."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HARMLESS = {"__get__", "dim", "size", "numel", "__len__", "__hash__", "__repr__"}
"""Functions that read a tensor's metadata, such as its shape, but not its values."""


class DrawsApart(Messenger):
    """Finds the sites of the enclosed guide whose drawn values the guide uses in no computation.

    A drawn value can influence another site's distribution only through a torch operation on it: ``if``, ``item()``, an
    in-place write, scripted code and custom autograd functions all need one. This handler sees every such operation.
    A site is in ``names`` if no operation used its value, and none used an earlier site's value before it was drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: list[tuple[str, Tensor]] = []  # keeps the values alive, so that torch does not reuse their memory
        self._memory: dict[tuple[int, int], list[str]] = {}
        self._before_use: set[str] = set()
        self._used: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        """The latent sites that are drawn apart from all others."""
        return frozenset(self._before_use - self._used)

    def __enter__(self) -> Self:
        super().__enter__()
        self._modes = ExitStack()
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._modes.close()
        super().__exit__(*exception)

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if not self._used:
            self._before_use.add(name)
        if isinstance(value, Tensor) and (memory := _memory(value)) is not None:
            self._drawn.append((name, value))
            self._memory.setdefault(memory, []).append(name)
        else:
            self._used.add(name)

    def met(self, *arguments: Any) -> None:
        """Record the sites whose values are among the arguments of an operation."""
        if self._memory:
            for value in tree_leaves(arguments):
                if isinstance(value, Tensor) and (memory := _memory(value)) is not None:
                    self._used.update(self._memory.get(memory, ()))


class _Operations(TorchDispatchMode):
    """Sees every operation on a tensor's values, including those in scripted code and autograd functions."""

    def __init__(self, draws: DrawsApart):
        super().__init__()
        self.draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.draws.met(args, kwargs)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees functions that read a tensor's memory without a dispatched operation, such as ``tolist`` and ``torch.tensor``."""

    def __init__(self, draws: DrawsApart):
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _HARMLESS:
            self.draws.met(args, kwargs)
        return func(*args, **(kwargs or {}))


def _memory(value: Tensor) -> tuple[int, int] | None:
    """A key for the memory of a tensor; None for a tensor without a storage, such as a sparse one."""
    try:
        # An outer mode, such as local reparameterization, would count the queries below as a use.
        with torch._C.DisableTorchFunction():
            return value.untyped_storage()._cdata, int(value.storage_offset())
    except (NotImplementedError, RuntimeError):
        return None
