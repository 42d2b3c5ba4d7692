"""The elementwise work of mean-field training: noise, samples, moments, KL and their gradients, each in one pass.

Two paths with one interface: ``compiled`` (C, built once, for the processor) and ``torch_path`` (any tensor
on any device). :func:`path` picks one for a tensor. Both draw from torch's global generator.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from pyro_lottery.errors import unknown
from pyro_lottery.kernels import compiled, torch_path
from pyro_lottery.kernels.layout import Layout

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


def processor_name() -> str:
    """What the processor is called, as far as the machine tells."""
    return compiled.processor_name()


def memory() -> int:
    """Bytes of memory that this process may have: the machine's, or fewer where its container has a limit; where the
    system does not tell (Windows), as many as there can be.
    """
    try:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        here = sys.maxsize
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        with suppress(OSError, ValueError):  # "max", or there are none
            here = min(here, int(Path("/sys/fs/cgroup", name).read_text()))
    return here


@functools.cache
def keep_memory() -> None:
    """Let this process keep the memory that tensors free instead of giving it back after each use (Linux, glibc).

    For the whole process and for good, so that commands alone do it by themselves: a process that tries one network
    after the other would keep the sum of what they needed.

    A training step frees and takes the same hundreds of megabytes again; fetched anew from the system each time, every
    page is first filled with zeros. On resnet18, batch 32, two cores, that is the difference between a Bayesian step of
    1.12 and of 1.05 times the deterministic one. Peak memory was the same (3.5 GB).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # names and numbers of glibc's malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
