"""Device, precision, memory layout and available memory, for training and prediction."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lottery.errors import UserError, unknown

PRECISIONS = ("32", "tf32", "bf16")
"""``32`` computes in float32 throughout. ``tf32`` rounds the factors of convolutions and matrix products to 10 bits, on a GPU that
can. ``bf16`` computes what torch's autocast lists (convolutions, matrix products, attention) in bfloat16, and all else as ``32``."""


def has_bf16(device: torch.device) -> bool:
    """Return whether ``device`` computes in bf16 natively; emulation is ten times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(name: str, device: torch.device, is_faster: Callable[[], bool] = lambda: False) -> str:
    """Return ``name``, with ``auto`` replaced by ``bf16`` where ``device`` has it natively and is faster, and by ``32`` otherwise.

    A GPU is faster in bf16. A CPU may be slower, so there ``is_faster`` measures; by default, ``auto`` is ``32`` on a CPU. On a
    Xeon with avx512_bf16 and without AMX, training steps of resnet20 and resnet18 took 1.3 to 1.4 times as long in bf16.
    """
    if name != "auto":
        return name
    return "bf16" if has_bf16(device) and (device.type == "cuda" or is_faster()) else "32"


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context for a forward pass in ``precision``, which has no effect for fp32 on a CPU, where ``auto`` and ``tf32`` mean it.

    Raises ``UserError`` for an unknown precision.
    """
    precision = resolve_precision(precision, device)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, (*PRECISIONS, "auto"))
    if device.type == "cuda":
        return _Products(precision == "tf32", torch.autocast("cuda", torch.bfloat16, precision == "bf16"))
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def products(device: torch.device, precision: str) -> Any:
    """Return the context in which a GPU's float32 convolutions and matrix products are those of ``precision``, backward ones too.

    By torch's own default, convolutions are in TF32 and matrix products are not.
    """
    return _Products(precision == "tf32", nullcontext()) if device.type == "cuda" else nullcontext()


class _Products:
    """Sets torch's switches of TF32, and sets them back; enters another context too."""

    def __init__(self, tf32: bool, also: Any):
        self.tf32, self.also = tf32, also
        cudnn: Any = torch.backends.cudnn
        self.switches = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)

    def __enter__(self) -> None:
        self.before = [switch.fp32_precision for switch in self.switches]
        for switch in self.switches:
            switch.fp32_precision = "tf32" if self.tf32 else "ieee"
        self.also.__enter__()

    def __exit__(self, *error: object) -> None:
        self.also.__exit__(*error)
        for switch, value in zip(self.switches, self.before, strict=True):
            switch.fp32_precision = value


def channels_last(images: Tensor) -> Tensor:
    """Return images [n, c, h, w] in the channels-last layout, which is fastest on CPUs and GPUs; others stay as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def channels_last_(module: nn.Module) -> None:
    """Convert every parameter and buffer with four dimensions to the channels-last layout, in place."""
    module._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)


def contiguous_(module: nn.Module) -> None:
    """Convert every parameter and buffer to torch's usual layout, in place."""
    module._apply(lambda t: t.contiguous())


def resolve_device(name: str) -> torch.device:
    """Return the device named ``name``; ``auto`` is the GPU if there is one, and the CPU otherwise.

    Raises ``UserError`` for a device that this machine does not have.
    """
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
    """Return the processor's model name, or its architecture if the system does not report a name."""
    names = [line.partition(":")[2].strip() for line in processor().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor() -> str:
    """Return the processor's model name and features, which decide what ``-march=native`` compiles to.

    Compiled code and measured times are kept per processor, since machines with different processors may share a cache folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() + platform.machine()


def cache_folder() -> Path:
    """Return the user's cache folder of this library: ``$XDG_CACHE_HOME/pyro_lottery``, by default ``~/.cache/pyro_lottery``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_lottery"


def memory() -> int:
    """Return the number of bytes of memory that this process may use: the machine's memory or its container's limit.

    Returns ``sys.maxsize`` on systems that do not report it (Windows).
    """
    try:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        here = sys.maxsize
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, versions 2 and 1
        with suppress(OSError, ValueError):  # no such file, or "max" for no limit
            here = min(here, int(Path("/sys/fs/cgroup", name).read_text()))
    return here


@functools.cache
def keep_memory() -> None:
    """Let this process keep the memory that tensors free, instead of returning it to the system (Linux with glibc).

    The setting is permanent and applies to the whole process, so only the commands use it: a process that trains several
    networks in turn would keep the sum of their memory.

    A training step frees hundreds of megabytes and allocates them again, and the system fills every new page with zeros.
    Measured on resnet18, batch 32, two cores: a Bayesian step takes 1.12 times as long as a deterministic one without
    this setting and 1.05 times with it. Peak memory was the same (3.5 GB).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
