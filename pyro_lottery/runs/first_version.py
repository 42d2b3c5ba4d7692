"""Run folders of version 0.1.0, which had no manifests: a level was finished when ``results.csv`` had its row.

Each row of its tables ended with a CRC-32 over the header, the row and the number of rows.
"""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_lottery import files, untrusted
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.runs.manifest import COLUMNS, checked_row
from pyro_lottery.types import LevelResult, ticket_checksum

if TYPE_CHECKING:
    from pyro_lottery.runs.config import Config
    from pyro_lottery.runs.folder import RunFolder


def rows(path: Path) -> list[LevelResult]:
    """The rows of a ``results.csv`` of version 0.1.0; an empty list for any other file. Warns of each damaged row."""
    found = []
    for values in _table(path):
        whole = {
            n: int(v) if COLUMNS.get(n) == "int" and v is not None and v == int(v) else v for n, v in values.items()
        }
        found.append(checked_row(whole, path))
    return found


def adopt(run: RunFolder, config: Config) -> None:
    """Write the manifests of the finished levels of a folder of version 0.1.0; a damaged level is set aside with a warning."""
    table = run.path / "results.csv"
    for row in rows(table):
        level = run.level(row.level)
        if level.manifest() is not None:  # by an earlier call that was killed before it finished
            continue
        try:
            epochs = config.epochs_of(row.level)
            if len(_table(level.path / "history.csv")) != epochs:
                raise Damaged(f"{level.path / 'history.csv'} has fewer than {epochs} undamaged epochs")
            level.check_content(row, epochs)
            rewind = row.level == 0 and run.rewinds_late
            if rewind:
                run.rewind_point.load_posterior()
            level.finish(row, ticket_checksum(level.load_ticket()), rewind)
        except (FileNotFoundError, Damaged) as error:
            warnings.warn(f"{error}; level {row.level} is trained again", stacklevel=2)
            if level.path.exists():
                level.set_aside()
    if _header(table):
        table.unlink()  # the session then writes it from the manifests


def _header(path: Path) -> str:
    """The header of a table of version 0.1.0, without its checksum column; empty for any other file, or a missing one."""
    try:
        first = untrusted.read_text(path, "replace").partition("\n")[0]
    except OSError:
        return ""
    return first.removesuffix(f",{files.CRC}") if first.endswith(f",{files.CRC}") else ""


def _table(path: Path) -> list[dict[str, Any]]:
    """The undamaged rows of a table of version 0.1.0, by column; an empty cell is None."""
    header = _header(path)
    if not header:
        return []
    names, found = header.split(","), []
    lines = untrusted.read_text(path, "replace").splitlines()[1:]
    for line in lines:
        values, _, crc = line.rpartition(",")
        if not any(crc == f"{zlib.crc32(f'{header}{values}{count}'.encode()):08x}" for count in range(1, 1000)):
            warnings.warn(f"{path}: the row {line[:20]!r} is damaged", stacklevel=2)
            continue
        try:
            numbers = [float(v) if v else None for v in values.split(",")]
            found.append(dict(zip(names, numbers, strict=True)))
        except ValueError as error:
            raise UserError(f"{path} is not a table of numbers ({one_line(error)})") from error
    return found
