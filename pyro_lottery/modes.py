"""Training and evaluation modes of a network's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put ``net`` in evaluation mode within this context; BatchNorm then uses its running statistics without updating them.

    Afterwards each module returns to its own previous mode, since the user may have frozen some of them.
    """
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
