"""JSON objects that carry a checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_lottery import files
from pyro_lottery.errors import UserError, one_line

CRC = "crc32"
"""Key of the checksum in an object; it covers all other entries."""


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as JSON, atomically, with a CRC-32 of its entries."""
    value = {name: v for name, v in value.items() if name != CRC}
    files.write_json(path, value | {CRC: _crc(json.dumps(value))})


def read_object(path: Path) -> dict[str, Any]:
    """Read an object of :func:`write_object`.

    Raises ``UserError`` if the file cannot be read, is not a JSON object or fails its checksum.
    """
    try:
        found = json.loads(files.read_text(path))
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
    if found.pop(CRC, None) != _crc(json.dumps(found)):
        raise UserError(f"{path} fails its checksum: it was changed or damaged; restore a copy")
    return found
