"""``level_NN/level.json``, the manifest of a finished level. It is written last: a level without it is not finished."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pyro_lottery import files, untrusted
from pyro_lottery.errors import Damaged, UserError
from pyro_lottery.types import LevelResult

_OF_CLASSES = ("test_accuracy", "max_test_accuracy", "mace", "ece", "brier")
_OF_REAL_TARGETS = ("coverage_50", "coverage_80", "coverage_95")
COLUMNS = {f.name: str(f.type) for f in fields(LevelResult)}
"""Columns of ``results.csv`` and their types."""


@dataclass(frozen=True)
class Manifest:
    """A finished level's row of ``results.csv``, and the checksums of its ticket and files."""

    result: LevelResult
    """The level's row of ``results.csv``."""
    ticket: int
    """CRC-32 of the ticket that the level was trained from (``types.ticket_checksum``)."""
    files: Mapping[str, str]
    """Checksums of the level's files, by name."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """How each pruned layer was computed: ``sparse`` or ``dense``."""

    def save(self, path: Path) -> None:
        """Write the manifest as JSON with its own checksum."""
        found = {
            "result": asdict(self.result),
            "ticket": self.ticket,
            "files": dict(self.files),
            "layers": dict(self.layers),
        }
        files.write_object(path, found)

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """Read a manifest; None if the file does not exist.

        Raises ``Damaged`` if it is damaged, and ``OSError`` if it cannot be read now, since it may be whole.
        """
        if not path.exists():
            return None
        try:
            found = untrusted.read_object(path)
            if type(ticket := found.get("ticket")) is not int or not isinstance(sums := found.get("files"), dict):
                raise UserError(f"{path} is not the manifest of a level")
            layers = found.get("layers", {})  # manifests of before sparse layers have none
            if not isinstance(layers, dict) or any(way not in ("sparse", "dense") for way in layers.values()):
                raise UserError(f"{path}: layers is {layers!r}; expected sparse or dense for each layer")
            return cls(checked_row(found.get("result"), path), ticket, sums, layers)
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None  # the process that trains the run has just set the level aside
            if isinstance(error.__cause__, OSError) and files.may_be_good(error.__cause__):
                raise error.__cause__ from None
            raise Damaged(str(error)) from error


def checked_row(found: Any, where: Path) -> LevelResult:
    """A row of ``results.csv`` from its values by column; raises ``UserError`` for wrong values, which names their file ``where``."""
    if not isinstance(found, Mapping):
        raise UserError(f"{where} holds no row of results.csv")
    if other := found.keys() - COLUMNS.keys():
        raise UserError(f"{where} has a column {min(other)!r}; expected only {', '.join(COLUMNS)}")
    row = {name: found.get(name) for name in COLUMNS}
    for name, value in row.items():
        kind = COLUMNS[name]
        if value is None and "None" not in kind:
            raise UserError(f"{where} has no {name}")
        known = value is None or (type(value) is int if kind == "int" else type(value) in (int, float))
        if not known or (
            value is not None and not (math.isfinite(value) if type(value) is float else abs(value) < 2**63)
        ):
            raise UserError(f"{where} has {value!r} as {name} of level {row['level']}")
    needed = _OF_REAL_TARGETS if row["test_accuracy"] is None else _OF_CLASSES
    if missing := [name for name in needed if row[name] is None]:
        raise UserError(f"{where} has no {missing[0]} of level {row['level']}")
    result = LevelResult(**row)  # type: ignore[arg-type]  # as has been checked
    density = result.remaining / result.total if result.total else 1.0  # as masks.density
    if result.level < 0 or not 0 <= result.remaining <= result.total or result.density != density:
        raise UserError(
            f"{where}: level {result.level} keeps {result.remaining} of {result.total} weights, density {result.density}"
        )
    return result
