"""The elementwise work of mean-field training: noise, samples, moments, KL and their gradients, each in one pass.

Two paths with one interface: ``compiled`` (C, built once, for the processor) and ``torch_path`` (any tensor
on any device). :func:`path` picks one for a tensor. Both draw from torch's global generator.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from pyro_lottery.errors import unknown
from pyro_lottery.kernels import compiled, torch_path
from pyro_lottery.kernels.layout import Layout
from pyro_lottery.machine import keep_memory, memory, processor_name

PATHS = ("auto", "compiled", "torch")
_choice = "auto"

__all__ = ["PATHS", "Layout", "keep_memory", "memory", "path", "processor_name", "using"]


def path(tensor: Tensor, bf16: bool = False) -> ModuleType:
    """The path for tensors like this one: compiled code where it can be built and they are fp32 on the processor (for
    ``perturb`` alone also ``bf16``), else torch.

    Says once, as a warning, that there is no compiler.
    """
    known = tensor.dtype == torch.float32 or (bf16 and tensor.dtype == torch.bfloat16)
    if _choice == "torch" or tensor.device.type != "cpu" or not known:
        return torch_path
    problem = compiled.problem()
    if problem is None:
        return compiled
    if _choice == "compiled":
        raise RuntimeError(problem)
    _say_once(f"{problem}; training takes the pure torch path, with other random numbers")
    return torch_path


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


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
