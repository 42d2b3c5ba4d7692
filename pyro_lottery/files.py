"""Writing files so that a kill or a full disk never leaves half of one, and reading them so that damage is seen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pyro_lottery.errors import Damaged, UserError, one_line

_NUMBERS = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64,
}  # fmt: skip
_MAKES_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor(_v2)?|parameter)|torch (\w*Storage|Size|device)"
    r"|torch\.nn\.parameter Parameter|torch\.storage _?\w*Storage"
)


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
        if odd := [name for name, value in tensors.items() if value.dtype not in _NUMBERS]:
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


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """A plain ``state_dict`` from ``.safetensors``, or from what ``torch.save`` wrote, without running code in it.

    A dictionary under the key ``state_dict`` is taken out of its wrapping. Raises ``UserError`` for anything else.
    """
    try:
        _check_regular(path)
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            _check_pickle(path)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a .safetensors or .pt file with a state_dict") from None
    except Exception as error:  # a hostile or damaged file may fail in any way
        raise UserError(
            f"{path} cannot be read as a state_dict ({one_line(error)}); save it with torch.save or safetensors"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise UserError(f"{path} holds no state_dict: expected a dictionary of tensors by name")
    for name, value in found.items():
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.dtype not in _NUMBERS:
            raise UserError(f"{path}: {name} is a {value.dtype} tensor ({value.layout}); expected dense real numbers")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{path}: {name} repeats fewer numbers than its shape {tuple(value.shape)}; save it contiguous"
            )
    return dict(found)


def _check_pickle(path: Path) -> None:
    """Raise ``ValueError`` for a file by ``torch.save`` that may take far more memory than its size: one that is compressed,
    names one record many times, or calls other things than what makes tensors.
    """
    with ExitStack() as opened:
        if zipfile.is_zipfile(path):
            archive = opened.enter_context(zipfile.ZipFile(path))
            entries = archive.infolist()
            if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError("it is compressed, and may hold far more than its size")
            pickles = [opened.enter_context(archive.open(e)) for e in entries if e.filename.endswith("data.pkl")]
        else:  # of torch before 1.6: a number, a version, a machine, the dictionary and its storages, one after the other
            file = opened.enter_context(path.open("rb"))
            pickles = [file] * 5
        for pickled in pickles:
            for opcode, argument, _ in pickletools.genops(pickled):
                if opcode.name in ("STACK_GLOBAL", "INST") or (
                    opcode.name == "GLOBAL" and not _MAKES_TENSORS.fullmatch(str(argument))
                ):
                    raise ValueError(f"it calls {argument or opcode.name}, which makes no tensors")


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of the names, sizes and modification times of ``paths``, to see whether any of them changed."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        stat = path.stat()
        digest.update(f"{'/'.join(path.parts[-3:])} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
