"""Training and evaluation modes of a network's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import nn

from pyro_lottery.threads import TURN


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


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, without gradients, Pyro's validation and other threads; restores everything at the end.

    Tensors that are made within are ordinary ones also in ``torch.inference_mode``, which does not count what changes them.
    """
    with TURN, evaluating(model), torch.inference_mode(False), torch.no_grad(), pyro.validation_enabled(False):
        yield
