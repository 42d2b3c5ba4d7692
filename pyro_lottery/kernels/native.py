"""The library of C kernels: built by the system's compiler on first use, kept in the user's cache folder, called by ctypes."""

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

from pyro_lottery.machine import cache_folder, processor

_LAST = torch.channels_last
SOURCES = [Path(__file__).with_name(name) for name in ("kernels.c", "sparse.c", "norm.c")]
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def problem() -> str | None:
    """Return why the compiled kernels are not available, or None if they are."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Any, str | None]:
    compiler = shlex.split(os.environ.get("CC") or "cc")  # CC may hold arguments, or "ccache cc"
    program = shutil.which(compiler[0])
    try:
        known = repr(([source.read_bytes() for source in SOURCES], FLAGS, compiler, program, processor()))
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


@functools.cache
def code(*more: str) -> str:
    """A checksum of the kernels, of the functions that call them and of the files ``more``."""
    folder = Path(__file__).parent
    paths = [*folder.glob("*.c"), *folder.glob("*.py"), *map(Path, more)]
    return _digest(b"".join(path.read_bytes() for path in sorted(paths)))


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
        command = [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[0])
        library = cache_folder() / f"{key}-{_digest(built.read_bytes())}.so"
        os.replace(built, library)  # atomic, since two processes may build it at the same time
    return library


def call(name: str, *arguments: Any) -> None:
    """Call the kernel ``name``. Integers are passed as 64 bits, tensors as pointers, and None as a null pointer.

    Raises ``ValueError`` for a tensor that is not on the CPU or whose elements are not one block of memory.
    """
    getattr(_load()[0], name)(*(argument(a) for a in arguments))


def argument(value: Any) -> Any:
    """Return ``value`` as ctypes passes it."""
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or not (value.is_contiguous() or value.is_contiguous(memory_format=_LAST)):
            raise ValueError(f"a kernel got a tensor of strides {value.stride()} on {value.device}")
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_uint64(value)
    return value


def number(name: str) -> int:
    """Return the result of a kernel without arguments that returns an integer."""
    return int(getattr(_load()[0], name)())
