"""What training and prediction ask of the computer: device, precision, layout and memory."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lottery.errors import UserError, unknown

PRECISIONS = ("32", "bf16")


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; others emulate it, ten times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the device has it, else 32."""
    return ("bf16" if has_bf16(device) else "32") if name == "auto" else name


def autocast(device: torch.device, precision: str) -> Any:
    """The context of a forward pass: bf16 autocast, or nothing for fp32."""
    precision = resolve_precision(precision, device)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, (*PRECISIONS, "auto"))
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def channels_last(images: Tensor) -> Tensor:
    """Images in the layout in which convolutions are fastest on processors and GPUs alike."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def channels_last_(module: nn.Module) -> None:
    """Bring every weight and buffer of four dimensions to that layout, in place; those of Conv3d have five, and stay."""
    module._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one; a device that is not there raises ``UserError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(device.type)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here; use auto, cpu, cuda or cuda:N") from error
    return device


def processor_name() -> str:
    """What the processor is called, as far as the machine tells."""
    names = [line.partition(":")[2].strip() for line in processor().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() + platform.machine()


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
