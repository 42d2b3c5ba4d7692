"""Atomic writing, so that a kill or a full disk never leaves half a file, and reading that detects damage."""

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
"""Dtypes that torch can compare, add and convert on every device."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, flush it to the disk and rename it to ``path``.

    Raises ``OSError`` that names ``path`` if this fails; the previous file is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _check_regular(path)  # the rename would replace a device by a file
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if (size := os.fstat(file.fileno()).st_size) != len(data):
                    raise OSError(errno.EIO, f"only {size} of {len(data)} bytes were written")
            replace(temporary, path)
        finally:
            with suppress(
                OSError
            ):  # it would hide the first error; a resumed run removes a temporary file that is left
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_refused(error: OSError) -> bool:
    """Return whether ``error`` is due to the path, so that another path would work; a full or failing disk is not."""
    return error.errno in (
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
    )  # fmt: skip


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target`` in the same folder and flush the folder, so that the rename survives a power cut."""
    os.replace(source, target)
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open folders
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(folder)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a regular file of at most 64 MiB.

    Raises ``OSError`` for larger files and for other kinds, such as pipes, where reading might never end.
    """
    _check_regular(path)
    if path.stat().st_size > 2**26:
        raise OSError(errno.EFBIG, "more than 64 MiB of text", str(path))
    return path.read_text("utf-8", errors)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> int:
    """Return the CRC-32 of ``text`` and of the names and bytes of ``tensors``, which must be on the CPU."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def crc32_of(path: Path) -> str:
    """Return the CRC-32 of a regular file's bytes as eight hexadecimal digits."""
    _check_regular(path)
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
    """Write ``tensors`` to ``path`` atomically as safetensors, with a checksum and ``info`` (JSON) in the metadata."""
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # A single metadata key, because safetensors writes several in random order and equal runs must give equal files.
    text = json.dumps(dict(info or {}))
    metadata = {"pyro_lottery": json.dumps({"checksum": checksum(on_cpu, text), "info": text})}
    write_atomic(path, safetensors.torch.save(on_cpu, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_tensors` and return ``(tensors on the CPU, info)``.

    Runs no code from the file and takes no more memory than the file has bytes, since safetensors first compares all shapes
    with the file's length. Raises ``Damaged`` if the file cannot be parsed or fails its checksum.
    """
    _check_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["pyro_lottery"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        expected, text = header["checksum"], header["info"]
        info = json.loads(text)
        if odd := [name for name, value in tensors.items() if value.dtype not in NUMBERS]:
            raise TypeError(f"{odd[0]} is {tensors[odd[0]].dtype}")
        whole = checksum(tensors, text) == expected and isinstance(info, dict)
    except (FileNotFoundError, MemoryError):
        raise
    except OSError as error:  # no permission or a failing disk; the file itself may be good
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except Exception as error:  # a foreign file may fail in any way
        raise Damaged(f"{path} cannot be read: {one_line(error)}") from error
    if not whole:
        raise Damaged(f"{path} fails its checksum")
    return tensors, info
