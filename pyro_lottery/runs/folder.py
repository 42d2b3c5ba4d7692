"""The run folder: the name and the format of each of its files; those of a level are in level_folder.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyro_lottery import files, untrusted
from pyro_lottery.errors import Damaged, UserError
from pyro_lottery.runs import first_version
from pyro_lottery.runs.config import MOVING
from pyro_lottery.runs.level_folder import LevelFolder, as_csv
from pyro_lottery.runs.lock import is_busy, locked
from pyro_lottery.runs.manifest import COLUMNS
from pyro_lottery.types import LevelResult, Mask, Posterior, Sites

ORIGINS = ("control", "transplant")
"""Facts of ``config.json`` that say how the folder's tickets were made if not by pruning."""
OF_IMAGES = {"ood": ("ood",), "histogram": ("images",)}
"""Tables of an evaluation with rows of several kinds of images, and the column that names them."""
TICKETS_OF_RUN = "the run's tickets"
"""What the fact ``transplant`` says of tickets of a run; of a file it is the checksum."""
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_MADE_FIRST = re.compile(r"\.lock|\.owner|\.(config\.json|\.owner)\.\d+\.tmp")
"""Files that a folder may hold before it has a config.json."""


class RunFolder:
    """A run: ``config.json``, one folder per level, and ``results.csv``, which is written from the levels' manifests."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def is_new(self) -> bool:
        """Whether the folder holds no run yet; raises ``UserError`` if it holds other files."""
        if (self.path / "config.json").exists():
            return False
        if self.path.exists() and any(not _MADE_FIRST.fullmatch(p.name) for p in self.path.iterdir()):
            raise UserError(f"--run-dir {self.path} is not empty and is not a run folder; choose another folder")
        return True

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``: every option, and the facts recorded when the run started."""
        files.write_object(self.path / "config.json", config)

    @property
    def config(self) -> dict[str, Any]:
        """The contents of ``config.json``; raises ``UserError`` if the file is missing or damaged."""
        path = self.path / "config.json"
        if not path.exists():
            raise UserError(
                f"{self.path} is not a run folder: it has no config.json; name a folder that a command of pyro_lottery made"
            )
        config = untrusted.read_object(path)
        for name in ("data", "versions", "hardware"):
            if not isinstance(value := config.get(name, {}), dict):
                raise UserError(f"{path}: {name} is {value!r}; expected an object")
        for name in ORIGINS:
            if not isinstance(config.get(name, ""), str):
                raise UserError(f"{path}: {name} is {config[name]!r}; expected text")
        return config

    @property
    def origin(self) -> str:
        """How the folder's tickets were made: ``control`` or ``transplant``, or empty if by pruning."""
        config = self.config
        return next((name for name in ORIGINS if name in config), "")

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder against other processes; raises ``Busy`` if another process holds the lock."""
        return locked(self.path)

    def busy(self) -> bool:
        """Whether another process holds the folder's lock now."""
        return is_busy(self.path)

    def level(self, number: int) -> LevelFolder:
        """The folder of one level."""
        return LevelFolder(self.path / f"level_{number:02d}", number)

    def levels(self) -> list[int]:
        """Numbers of the levels that have a folder, finished or not."""
        names = [p.name.removeprefix("level_") for p in self.path.glob("level_*")]
        return sorted(int(name) for name in names if name.isdecimal() and name.isascii())

    @property
    def rewind_point(self) -> LevelFolder:
        """The folder of the posterior that late rewinding goes back to."""
        return LevelFolder(self.path / "rewind")

    @property
    def rewinds_late(self) -> bool:
        """Whether tickets are rewound to level 0 after K epochs (``--rewind epoch:K`` or ``restart:K``)."""
        return str(self.config.get("rewind", "")).startswith(("epoch:", "restart:"))

    def load_rewind_point(self) -> tuple[Posterior, Sites]:
        """The values that tickets are rewound to: all weights at the start of level 0, or after K of its epochs."""
        if self.rewinds_late:
            return self.rewind_point.load_posterior()
        first = self.level(0).load_ticket()
        return first.start, first.net

    def mask(self, level: int) -> Mask:
        """The mask of the trained network of a finished level: the one that its schedule ended with, or that of its ticket."""
        moved = self.level(level).load_moved_mask() if level == 0 and self.config.get("schedule") in MOVING else None
        return self.level(level).load_ticket().mask if moved is None else moved

    def results(self) -> list[LevelResult]:
        """The rows of all finished levels, in order; raises ``UserError`` if a manifest is damaged."""
        rows = {row.level: row for row in first_version.rows(self.path / "results.csv")}
        for number in self.levels():
            try:
                manifest = self.level(number).manifest()
            except Damaged as error:
                raise UserError(f"{error}; run the command of this run again to train the level again") from error
            if manifest is not None:
                rows[number] = manifest.result
        return [rows[number] for number in sorted(rows)]

    def finished(self) -> list[LevelResult]:
        """The rows of all finished levels, in order; raises ``UserError`` if no level is finished."""
        rows = self.results()
        if not rows:
            raise UserError(f"{self.path} has no finished level yet; repeat its command to train one")
        return rows

    def write_results(self) -> None:
        """Write ``results.csv`` from the manifests, unless it is up to date."""
        path, rows = self.path / "results.csv", [asdict(row) for row in self.results()]
        text = as_csv(list(COLUMNS), rows) if rows else b""
        if rows and not (path.is_file() and path.read_bytes() == text):
            files.write_atomic(path, text)
        elif not rows:
            path.unlink(missing_ok=True)

    def drop_leftovers(self) -> None:
        """Remove temporary files of processes that were killed while writing."""
        for folder in (self.path, self.rewind_point.path, *(self.level(number).path for number in self.levels())):
            for leftover in folder.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(leftover.name):
                    leftover.unlink()

    def check_places(self) -> None:
        """Raise ``UserError`` if a file or a broken link stands where the run writes a folder, before any level is trained."""
        for folder in (self.rewind_point.path, *(self.level(number).path for number in self.levels())):
            if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                raise UserError(f"{folder} is not a folder, which the run needs there; move it away")

    def derived(self, *names: str) -> RunFolder:
        """The subfolder ``names`` for tickets made from this run's, such as ``controls/reinit``; raises ``UserError`` if it is
        a symbolic link.
        """
        folder = self.path
        for name in names:
            folder = folder / name
            if folder.is_symlink():
                raise UserError(
                    f"{folder} is a symbolic link, which may lead out of the run folder; replace it by a folder"
                )
        return RunFolder(folder)

    def figure(self, name: str) -> Path:
        """The path of one of the run's figures."""
        return self.path / f"{name}.png"

    def evaluation_figure(self, name: str) -> Path:
        """The path of a figure of the run's evaluation."""
        return self.path / "evaluation" / f"{name}.png"

    def save_evaluation(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write a table of ``python -m pyro_lottery.evaluate`` to ``evaluation/NAME.csv`` and return all its rows; rows of other
        levels in the file are kept, and of other images.
        """
        import pandas as pd

        path, found = self.path / "evaluation" / f"{name}.csv", pd.DataFrame(rows)
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            with suppress(ValueError, KeyError, TypeError):  # a file that is not such a table is replaced
                # These options keep class names such as NA or 1 as text.
                old = pd.read_csv(path, dtype={"class": str}, keep_default_na=False, na_values=[""])
                keys = ["level", *OF_IMAGES.get(name, ())]
                again = old.set_index(keys).index.isin(found.set_index(keys).index)
                found = pd.concat([old[~again], found]).sort_values("level", kind="stable")
        files.write_atomic(path, found.to_csv(index=False).encode())
        return found.to_dict("records")  # type: ignore[return-value]
