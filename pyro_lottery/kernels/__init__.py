"""The elementwise work of mean-field training: noise, samples, moments, KL and their gradients, each in one pass.

Two paths with one interface: ``compiled`` (C, built once, fp32 tensors on the processor) and ``torch_path`` (any tensor
on any device). :func:`path` picks one for a tensor. Both draw from torch's global generator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from pyro_lottery.errors import unknown
from pyro_lottery.kernels import compiled, torch_path
from pyro_lottery.kernels.layout import Layout

PATHS = ("auto", "compiled", "torch")
_choice = "auto"

__all__ = ["PATHS", "Layout", "path", "using"]


def path(*tensors: Tensor) -> ModuleType:
    """The path for these tensors: compiled code where it can be built and they are fp32 on the processor, else torch.

    Says once, as a warning, that there is no compiler.
    """
    if _choice == "torch" or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return torch_path
    problem = compiled.problem()
    if problem is None:
        return compiled
    if _choice == "compiled":
        raise RuntimeError(problem)
    warnings.warn(f"{problem}; training takes the pure torch path, with other random numbers", stacklevel=2)
    return torch_path


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Within this context take one path: ``auto``, ``compiled`` (raises if it cannot be built) or ``torch``."""
    global _choice
    if choice not in PATHS:
        raise unknown("kernel path", choice, PATHS)
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before
