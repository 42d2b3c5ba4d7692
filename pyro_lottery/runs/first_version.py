"""Run folders of version 0.1.0, which had no manifests: a level was finished when ``results.csv`` had its row.

Each row of its tables ended with a CRC-32 over the header, the row and the number of rows.
"""

from __future__ import annotations

import re
import warnings
import zlib
from pathlib import Path
from typing import Any

from pyro_lottery import files, untrusted
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.runs.manifest import COLUMNS, checked_row
from pyro_lottery.types import LevelResult

RESULTS = (
    "level,density,remaining,total,test_accuracy,max_test_accuracy,val_accuracy,nll,mace,ece,brier,train_seconds,step_ms,"
    "selected_test_accuracy,rmse,val_rmse,coverage_50,coverage_80,coverage_95"
)
"""Columns of a ``results.csv`` of version 0.1.0, without that of the checksum."""
ROWS = 10_000
"""Most rows of a table that are read: more levels or epochs than any run has."""


def rows(path: Path) -> list[LevelResult]:
    """The rows of a ``results.csv`` of version 0.1.0; an empty list for any other file. Warns of each damaged row."""
    found = []
    for values in table(path):
        whole = {
            n: int(v) if COLUMNS.get(n) == "int" and v is not None and v.is_integer() else v for n, v in values.items()
        }
        found.append(checked_row(whole, path))
    return found


def _lines(path: Path) -> list[str]:
    """The lines of a table, the header first; none of a missing file, or of a folder or pipe in its place.

    Raises ``OSError`` for a table that may be whole but cannot be read now: it says which levels are finished.
    """
    try:
        return untrusted.read_text(path, "replace").splitlines()
    except OSError as error:
        if files.may_be_good(error):
            raise
        return []


def is_first(path: Path) -> bool:
    """Whether ``path`` is a table of version 0.1.0: its header, or a row of its ``results.csv``, has a checksum."""
    header, *lines = _lines(path)[:ROWS] or [""]
    return header.endswith(f",{files.CRC}") or any(_is_whole(RESULTS, line, len(lines)) for line in lines)


def table(path: Path) -> list[dict[str, Any]]:
    """The undamaged rows of a table of version 0.1.0, by column; an empty cell is None. A damaged header of results is mended."""
    if not is_first(path):
        return []
    header, *lines = _lines(path)
    header, found = header.removesuffix(f",{files.CRC}"), []
    if len(lines) > ROWS:
        raise UserError(f"{path} has {len(lines)} rows; expected at most {ROWS}")
    if header != RESULTS and any(_is_whole(RESULTS, line, len(lines)) for line in lines):
        warnings.warn(f"{path} has a damaged header; its rows are read", stacklevel=2)
        header = RESULTS
    for line in lines:
        if not _is_whole(header, line, len(lines)):
            warnings.warn(f"{path}: the row {line[:20]!r} is damaged", stacklevel=2)
            continue
        try:
            numbers = [float(v) if v else None for v in line.rpartition(",")[0].split(",")]
            found.append(dict(zip(header.split(","), numbers, strict=True)))
        except ValueError as error:
            raise UserError(f"{path} is not a table of numbers ({one_line(error)})") from error
    return found


def _is_whole(header: str, line: str, rows: int) -> bool:
    """Whether the row's checksum fits, whatever number of rows the table had when it was written."""
    values, _, crc = line.rpartition(",")
    if not re.fullmatch("[0-9a-f]{8}", crc):
        return False
    before = zlib.crc32(f"{header}{values}".encode())
    return any(crc == f"{zlib.crc32(str(count).encode(), before):08x}" for count in (rows, *range(1, 1000)))
