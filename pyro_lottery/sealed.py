"""JSON objects with a checksum, and tables of numbers with a checksum in each row."""

from __future__ import annotations

import csv
import io
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_lottery import files
from pyro_lottery.errors import UserError, one_line

CRC = "crc32"
"""Key of the checksum in an object, and name of the last column of a table.

In an object it covers all other entries; in a table it covers the header, the row and the number of rows."""


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` to ``path`` as JSON with a CRC-32 of its other entries."""
    value = {name: v for name, v in value.items() if name != CRC}
    files.write_json(path, value | {CRC: _crc(json.dumps(value))})


def read_object(path: Path) -> dict[str, Any]:
    """Read an object of :func:`write_object`, or a JSON object without a checksum.

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
    if CRC in found and found.pop(CRC) != _crc(json.dumps(found)):
        raise UserError(
            f"{path} fails its checksum; restore a copy (do not edit it: other options need another run folder)"
        )
    return found


def write_table(path: Path, names: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table whose last column is the CRC-32 of the header and the row, as they stand in the file, and of the
    number of rows, so that none is missing.
    """
    header = ",".join(names)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writerows(rows)
    lines = [f"{line},{_crc(f'{header}{line}{len(rows)}')}" for line in text.getvalue().splitlines()]
    files.write_atomic(path, "".join(f"{line}\n" for line in [f"{header},{CRC}", *lines]).encode())


def read_table(path: Path, repair: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read what :func:`write_table` wrote, or a table without checksums; all values are numbers or None.

    With the columns of a table as ``repair``, its whole rows are read, however many are missing, and the others warned of.
    """

    def whole(header: str, line: str) -> bool:
        values, _, crc = line.rpartition(",")
        counts = range(1, 1000) if repair else [len(lines)]
        return any(crc == _crc(f"{header}{values}{count}") for count in counts)

    try:
        header, *lines = files.read_text(path, "replace" if repair else "strict").splitlines() or [""]
        if not lines and repair:
            warnings.warn(f"{path} has no rows; levels are trained again", stacklevel=2)
            return []
        if not lines:
            raise ValueError("it has no rows; without it, levels are trained again")
        if checked := header.endswith(f",{CRC}"):
            header = header.removesuffix(f",{CRC}")
        if repair and header != ",".join(repair) and any(whole(",".join(repair), line) for line in lines):
            warnings.warn(f"{path} has a damaged header, which is mended", stacklevel=2)
            header, checked = ",".join(repair), True
        names, rows = header.split(","), []
        for line in lines:
            if checked and not whole(header, line):
                if repair is None:
                    raise ValueError(f"the row {line[:20]!r} fails its checksum; the run's command repairs it")
                warnings.warn(f"{path}: the row {line[:20]!r} is damaged; its level is trained again", stacklevel=2)
                continue
            values = (line.rpartition(",")[0] if checked else line).split(",")
            rows.append({n: float(v) if v else None for n, v in zip(names, values, strict=True)})
    except ValueError as error:
        raise UserError(f"{path} is not one of our tables ({one_line(error)})") from error
    return rows
