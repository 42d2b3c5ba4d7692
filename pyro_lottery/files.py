"""Atomic writing, so that a kill or a full disk never leaves half a file, and checksums, by which readers detect damage."""

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

CRC = "crc32"
"""Key of the checksum in an object; it covers all other entries."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, flush it to the disk and rename it to ``path``.

    Raises ``OSError`` that names ``path`` if this fails; the previous file is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        check_regular(path)  # the rename would replace a device by a file
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if (size := os.fstat(file.fileno()).st_size) != len(data):
                    raise OSError(errno.EIO, f"only {size} of {len(data)} bytes were written")
            replace(temporary, path)
        finally:
            with suppress(OSError):  # which would hide the first error; a resumed run removes what is left
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_refused(error: OSError) -> bool:
    """Return whether ``error`` is due to the path, so that another path would work; a full or failing disk is not."""
    return error.errno in (
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
    )  # fmt: skip


def may_be_good(error: OSError) -> bool:
    """Return whether the file that could not be read may be undamaged: without permission, or on a disk that fails.

    Other errors say that it is missing, is a folder or a pipe, or is too long.
    """
    return error.errno not in (errno.ENOENT, errno.EINVAL, errno.EFBIG)


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


def check_regular(path: Path) -> None:
    """Raise ``OSError`` if ``path`` exists and is not a regular file: a folder, a pipe or a device."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def crc_of(text: str) -> str:
    """Return the CRC-32 of a text as eight hexadecimal digits."""
    return f"{zlib.crc32(text.encode()):08x}"


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as JSON, atomically, with a CRC-32 of its entries."""
    value = {name: v for name, v in value.items() if name != CRC}
    write_json(path, value | {CRC: crc_of(json.dumps(value))})


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> int:
    """Return the CRC-32 of ``text`` and of the names and bytes of ``tensors``, which must be on the CPU."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def crc32_of(path: Path) -> str:
    """Return the CRC-32 of a regular file's bytes as eight hexadecimal digits."""
    check_regular(path)
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
