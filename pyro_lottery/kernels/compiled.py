"""The kernels in C, built by the system's compiler on first use, kept in the user's cache folder and called by ctypes.

Samples by torch.compile took 18 times as long (``python -m experiments.benchmarks.steps --kernels``). C needs nothing but a
compiler, and noise, exponential and sums are vectorised in one loop.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lottery.kernels.layout import Layout
from pyro_lottery.kernels.torch_path import Grads, draw_seed
from pyro_lottery.machine import processor

_LAST = torch.channels_last
SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
CHUNK = 4096  # must equal CHUNK in kernels.c


def problem() -> str | None:
    """Return why the compiled kernels are not available, or None if they are."""
    return _load()[1]


def cache_folder() -> Path:
    """Return the folder of built libraries: ``$XDG_CACHE_HOME/pyro_lottery``, by default ``~/.cache/pyro_lottery``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_lottery"


@functools.cache
def _load() -> tuple[Any, str | None]:
    compiler = shlex.split(os.environ.get("CC") or "cc")  # CC may hold arguments, or "ccache cc"
    program = shutil.which(compiler[0])
    try:
        known = repr((SOURCE.read_bytes(), FLAGS, compiler, program, processor()))
        key = f"kernels-{_digest(known.encode())}"
        library = _undamaged(key)
        if library is None:
            if program is None:
                return None, "there is no C compiler (cc, or the one that CC names) to build the fast kernels"
            library = _build(key, compiler)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"the fast kernels cannot be built ({error})"
    try:
        # torch is already loaded, so the library uses torch's OpenMP threads and does not start its own.
        return ctypes.CDLL(str(library)), None
    except OSError as error:
        return None, f"the fast kernels cannot be loaded ({error})"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _undamaged(key: str) -> Path | None:
    """The built library in the cache whose content has the checksum in its name; damaged ones are removed.

    The check comes before loading, because loading a library that lost its end, say in a power cut, may crash the interpreter.
    """
    for library in cache_folder().glob(f"{key}-*.so"):
        if library.stem == f"{key}-{_digest(library.read_bytes())}":
            return library
        library.unlink(missing_ok=True)
    return None


def _build(key: str, compiler: Sequence[str]) -> Path:
    """Build the library and put it into the cache as ``KEY-CHECKSUM.so``; raises ``RuntimeError`` if the compiler fails."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        built = Path(folder) / "kernels.so"
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[0])
        library = cache_folder() / f"{key}-{_digest(built.read_bytes())}.so"
        os.replace(built, library)  # atomic, since two processes may build it at the same time
    return library


def _call(name: str, *arguments: Any) -> None:
    getattr(_load()[0], name)(*(_argument(a) for a in arguments))


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or not (value.is_contiguous() or value.is_contiguous(memory_format=_LAST)):
            raise ValueError(f"a kernel got a tensor of strides {value.stride()} on {value.device}")
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_uint64(value)
    return value


def _int64(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _pointers(grads: Grads) -> Any:
    return (ctypes.c_void_p * len(grads))(*(_argument(g).value for g in grads))


def _floats(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")  # explicit, since torch's defaults may be others


def normal(count: int, like: Tensor) -> Tensor:
    """Return ``count`` standard normal numbers, float32 [count]."""
    out = _floats(count)
    _call("pl_normal", count, out, draw_seed())
    return out


def sample(layout: Layout, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return a sample of all weights [total]: loc + exp(log_scale)·ε where kept, 0 elsewhere."""
    out = _output(layout, loc)
    _call("pl_sample", len(loc), loc, log_scale, layout.index32, out, draw_seed())
    return out


def moments(layout: Layout, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and variances of all weights, [total] each, 0 where not kept."""
    mean, variance = _output(layout, loc), _output(layout, loc)
    _call("pl_moments", len(loc), loc, log_scale, layout.index32, mean, variance)
    return mean, variance


def kl(layout: Layout, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Return KL(N(loc, scale²) ‖ N(m, s²)) summed over each site, [sites]."""
    out = _floats(len(layout.kept))
    partial = torch.empty(sum(-(-n // CHUNK) for n in layout.kept), dtype=torch.float64, device="cpu")
    _call("pl_kl", len(layout.kept), _int64(layout.offsets), loc, log_scale, m, s, partial, out)
    return out


def sample_grad(
    layout: Layout, g: Grads, w: Tensor, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of loc and log_scale, given those of every site's sample (``g``) and KL (``weight`` [sites])."""
    g_loc, g_log_scale = torch.empty_like(loc), torch.empty_like(loc)
    weight = None if weight is None else weight.contiguous()
    _call(
        "pl_sample_grad", len(g), _int64(layout.offsets), _int64(layout.starts), _pointers(g), layout.index32, w, loc,
        log_scale, m, s, weight, g_loc, g_log_scale,
    )  # fmt: skip
    return g_loc, g_log_scale


def moments_grad(
    layout: Layout, g_mean: Grads, g_variance: Grads, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of loc and log_scale, given those of every site's mean, variance and KL (``weight`` [sites])."""
    g_loc, g_log_scale = torch.empty_like(loc), torch.empty_like(loc)
    weight = None if weight is None else weight.contiguous()
    _call(
        "pl_moments_grad", len(g_mean), _int64(layout.offsets), _int64(layout.starts), _pointers(g_mean),
        _pointers(g_variance), layout.index32, loc, log_scale, m, s, weight, g_loc, g_log_scale,
    )  # fmt: skip
    return g_loc, g_log_scale


def perturb(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean + √variance·ε and its derivative by the variance, ε / (2√variance).

    The results overwrite the arguments.
    """
    name = "pl_perturb" if mean.dtype == torch.float32 else "pl_perturb_bf16"
    _call(name, mean.numel(), mean, variance, draw_seed())
    return mean, variance


def _output(layout: Layout, like: Tensor) -> Tensor:
    return like.new_empty(layout.total) if layout.index is None else like.new_zeros(layout.total)
