"""A CUDA graph's counterpart on the CPU: the operations of one step, recorded and run again without the step's Python.

What a replay computes differently from the step depends on Python, and would be wrong in a CUDA graph too. So ``--graph`` is
tested on machines without a GPU. Only operations of torch are seen: kernels in C must be off (``kernels.using("torch")``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.benchmarks.launches import WAITS

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Tape(TorchDispatchMode):
    """Records the operations within this context; :meth:`replay` runs them again on the same memory.

    Raises ``RuntimeError`` for an operation for which the host would wait for a GPU, as a CUDA graph does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            raise RuntimeError(f"the host would wait for a GPU in {name}")
        found = func(*args, **kwargs)
        aliases = [r.alias_info for r in func._schema.returns]
        views = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
        if func._schema.name.startswith("aten::") and name not in (*_EMPTY, "detach") and not views:
            in_place = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            self._operations.append((func, args, kwargs, None if in_place else found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        """Run all operations again, each into the memory of its first result."""
        for func, args, kwargs, found in self._operations:
            again = func(*args, **kwargs)
            if isinstance(found, Tensor):
                found.copy_(again)
            elif found is not None:
                for old, new in zip(found, again, strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def record(work: Callable[[], None], optimizer: Adam) -> Callable[[], None]:
    """What :func:`pyro_lottery.training.graph.cuda_graph` does, on the CPU."""
    with Tape() as tape:
        work()
    return tape.replay
