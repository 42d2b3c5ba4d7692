"""Writing files so that a kill or a full disk never leaves half of one, and reading them so that damage is seen."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pyro_lottery.errors import Damaged, one_line

NUMBERS = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64,
}  # fmt: skip
"""What torch can compare, add and convert everywhere."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk and rename it into place.

    Raises ``OSError`` that names ``path``; what was there before then still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _check_regular(path)  # or a device would be replaced by a file
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if (size := os.fstat(file.fileno()).st_size) != len(data):
                    raise OSError(errno.EIO, f"only {size} of {len(data)} bytes were written")
            replace(temporary, path)
        finally:
            with suppress(OSError):  # or it would hide what went wrong; a resumed run removes what is left
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_refused(error: OSError) -> bool:
    """Whether another path would do; a full or failing disk is no fault of the path."""
    return error.errno in (
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
    )  # fmt: skip


def replace(source: Path, target: Path) -> None:
    """Rename a file within its folder so that the rename itself survives a power cut."""
    os.replace(source, target)
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such thing
            raise
    finally:
        os.close(folder)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file of at most 64 MiB; ``OSError`` for what is none, and would not end, a pipe say."""
    _check_regular(path)
    if path.stat().st_size > 2**26:
        raise OSError(errno.EFBIG, "more than 64 MiB of text", str(path))
    return path.read_text("utf-8", errors)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> int:
    """CRC-32 of a text, and of the names and bytes of tensors on the CPU."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, atomically, with a checksum and JSON ``info`` in the metadata."""
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # One metadata key alone: safetensors orders several at random, and equal runs shall give equal files.
    text = json.dumps(dict(info or {}))
    metadata = {"pyro_lottery": json.dumps({"checksum": checksum(on_cpu, text), "info": text})}
    write_atomic(path, safetensors.torch.save(on_cpu, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote as ``(tensors on the CPU, info)``; ``Damaged`` if it is not whole.

    Nothing in the file is run, and no more memory is taken than it has bytes: safetensors compares all shapes with its
    length first.
    """
    _check_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["pyro_lottery"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if "crc32" in header:  # of the first version, whose checksum did not cover ``info``
            expected, text = header["crc32"], ""
            info = header["info"]
        else:
            expected, text = header["checksum"], header["info"]
            info = json.loads(text)
        if odd := [name for name, value in tensors.items() if value.dtype not in NUMBERS]:
            raise TypeError(f"{odd[0]} is {tensors[odd[0]].dtype}")
        whole = checksum(tensors, text) == expected and isinstance(info, dict)
    except (FileNotFoundError, MemoryError):
        raise
    except OSError as error:  # no permission, a failing disk: the file may be whole
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except Exception as error:  # a foreign file may fail in any way
        raise Damaged(f"{path} cannot be read: {one_line(error)}") from error
    if not whole:
        raise Damaged(f"{path} fails its checksum")
    return tensors, info
