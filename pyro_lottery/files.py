"""Writing files so that a kill or a full disk never leaves half of one, and reading them so that damage is seen."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pyro_lottery.errors import Damaged, UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the rename itself survives a power cut
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the names and bytes of tensors on the CPU."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, atomically, with a checksum and JSON ``info`` in the metadata."""
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # One metadata key alone: safetensors orders several at random, and equal runs shall give equal files.
    metadata = {"pyro_lottery": json.dumps({"crc32": checksum(on_cpu), "info": dict(info or {})})}
    write_atomic(path, safetensors.torch.save(on_cpu, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote as ``(tensors on the CPU, info)``; ``Damaged`` if it is not whole."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["pyro_lottery"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if checksum(tensors) != header.get("crc32"):
        raise Damaged(f"{path} fails its checksum")
    return tensors, header["info"]


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """A plain ``state_dict`` from ``.safetensors``, or from what ``torch.save`` wrote, without running code in it.

    A dictionary under the key ``state_dict`` is taken out of its wrapping. Raises ``UserError`` for anything else.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a .safetensors or .pt file with a state_dict") from None
    except Exception as error:  # a hostile or damaged file may fail in any way
        text = str(error).split("\n")[0]
        raise UserError(
            f"{path} cannot be read as a state_dict ({text}); save it with torch.save or safetensors"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise UserError(f"{path} holds no state_dict: expected a dictionary of tensors by name")
    for name, value in found.items():
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.is_complex():
            raise UserError(f"{path}: {name} is a {value.dtype} tensor ({value.layout}); expected dense real numbers")
    return dict(found)


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of the names, sizes and modification times of ``paths``, to see whether any of them changed."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
