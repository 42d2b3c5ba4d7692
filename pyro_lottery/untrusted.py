"""Safe reading of files that somebody else may have written, and of the names of code in them, so that none of it runs unasked."""

from __future__ import annotations

import errno
import importlib
import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from pyro_lottery import files
from pyro_lottery.errors import Damaged, UserError, one_line

NUMBERS = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64,
}  # fmt: skip
"""Dtypes that torch can compare, add and convert on every device."""

_OURS = re.compile(r"[^.:]*|timm:.*|pyro\.infer\.autoguide\.Auto\w+")
"""Names that import no user code: built-in names, timm's networks and Pyro's AutoGuides."""


def foreign(*names: str) -> list[str]:
    """Return those of ``names`` that import user code: all import paths except timm's networks and Pyro's AutoGuides.

    >>> foreign("mean_field", "timm:resnet18.a1_in1k", "pyro.infer.autoguide.AutoNormal", "os.system", "os:system")
    ['os.system', 'os:system']
    """
    return [name for name in names if not _OURS.fullmatch(name)]


def load_callable(path: str, option: str, *others: type) -> Any:
    """Import and return the class or function at ``package.module.name`` or ``package.module:name``.

    The object may also be an instance of one of ``others``. Raises ``UserError`` that names ``option`` if the import fails
    or gives something else.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's module may raise anything
        text, expected = " ".join(str(error).split()), f"package.module{':' if ':' in path else '.'}name"
        raise UserError(f"{option} {path} cannot be imported ({text}); expected {expected}") from error
    if not (callable(found) or isinstance(found, others)):
        raise UserError(f"{option} {path} is a {type(found).__name__}; expected a class or a function")
    return found


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a regular file of at most 64 MiB.

    Raises ``OSError`` for larger files and for other kinds, such as pipes, where reading might never end.
    """
    files.check_regular(path)
    if path.stat().st_size > 2**26:
        raise OSError(errno.EFBIG, "more than 64 MiB of text", str(path))
    return path.read_text("utf-8", errors)


def read_object(path: Path) -> dict[str, Any]:
    """Read an object of :func:`write_object`.

    Raises ``UserError`` if the file cannot be read, is not a JSON object or fails its checksum.
    """
    try:
        found = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} holds text that is not valid Unicode ({one_line(error)})") from error
    if found.pop(files.CRC, None) != files.crc_of(json.dumps(found)):
        raise UserError(f"{path} fails its checksum: it was changed or damaged; restore a copy")
    return found


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_tensors` and return ``(tensors on the CPU, info)``.

    Runs no code from the file and takes no more memory than the file has bytes, since safetensors first compares all shapes
    with the file's length. Raises ``Damaged`` if the file cannot be parsed or fails its checksum.
    """
    files.check_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["pyro_lottery"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        expected, text = header["checksum"], header["info"]
        info = json.loads(text)
        if odd := [name for name, value in tensors.items() if value.dtype not in NUMBERS]:
            raise TypeError(f"{odd[0]} is {tensors[odd[0]].dtype}")
        whole = files.checksum(tensors, text) == expected and isinstance(info, dict)
    except (FileNotFoundError, MemoryError):
        raise
    except OSError as error:  # no permission or a failing disk; the file itself may be good
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except Exception as error:  # a foreign file may fail in any way
        raise Damaged(f"{path} cannot be read: {one_line(error)}") from error
    if not whole:
        raise Damaged(f"{path} fails its checksum")
    return tensors, info
