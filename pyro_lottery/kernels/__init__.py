"""Kernels for the elementwise work of mean-field training: noise, samples, moments, KL and their gradients.

There are three backends with the same functions: ``compiled`` (C, for float32 on the CPU) and ``triton_path`` (for float32 on a
GPU), each function of which goes over memory once, and ``torch_path`` (any precision and device). :func:`backend` picks one for
a tensor. All take their random numbers, or the seeds of these, from torch's global generator.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from pyro_lottery.errors import unknown
from pyro_lottery.kernels import compiled, native, torch_path
from pyro_lottery.kernels.layout import Layout

BACKENDS = ("auto", "compiled", "triton", "torch")
_choice = "auto"

__all__ = ["BACKENDS", "Layout", "backend", "using"]


def backend(tensor: Tensor, bf16: bool = False) -> ModuleType:
    """Return the backend, a module of kernels, for tensors like ``tensor``.

    This is the compiled one for float32 on the CPU if it can be built, Triton's for float32 on a GPU if Triton is installed,
    and the torch one otherwise. ``bf16`` allows bfloat16 too, which only ``perturb`` supports. Warns once if the compiled one
    cannot be built.
    """
    known = tensor.dtype == torch.float32 or (bf16 and tensor.dtype == torch.bfloat16)
    if known and (_choice == "triton" or (_choice == "auto" and tensor.device.type == "cuda" and _has_triton())):
        return importlib.import_module("pyro_lottery.kernels.triton_path")  # not before: Triton takes time to import
    if _choice == "torch" or tensor.device.type != "cpu" or not known:
        return torch_path
    problem = native.problem()
    if problem is None:
        return compiled
    if _choice == "compiled":
        raise RuntimeError(problem)
    _warn_once(f"{problem}; training uses the kernels in torch, whose random numbers differ")
    return torch_path


@functools.cache
def _has_triton() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Use the backend that ``choice`` names within this context: ``auto``, ``compiled``, ``triton`` or ``torch``.

    Raises ``UserError`` for another name; ``compiled`` raises ``RuntimeError`` on first use if it cannot be built.
    """
    global _choice
    if choice not in BACKENDS:
        raise unknown("kernel backend", choice, BACKENDS)
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before
