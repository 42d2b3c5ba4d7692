"""The run folder: the name and the format of each of its files. Nothing else spells a file name."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_lottery import files, masks, untrusted
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.runs import first_version
from pyro_lottery.runs.lock import is_busy, locked
from pyro_lottery.runs.manifest import COLUMNS, Manifest
from pyro_lottery.types import LevelResult, Posterior, Sites, Ticket, all_finite

ORIGINS = ("control", "transplant")
"""Facts of ``config.json`` that say how the tickets of a folder were made, if not by pruning."""
TICKET, POSTERIOR, HISTORY, MANIFEST = "ticket.safetensors", "posterior.safetensors", "history.csv", "level.json"
REWIND = f"../rewind/{POSTERIOR}"
"""The posterior that late rewinding goes back to, as seen from ``level_00/``, whose training saves it."""
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_MADE_FIRST = re.compile(r"\.lock|\.owner|\.(config\.json|\.owner)\.\d+\.tmp")
"""Files of a folder that is still to become a run."""


class LevelFolder:
    """``level_NN/``: what a level starts from, what it trained to, its epochs, its manifest, and a checkpoint while it trains."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.checkpoint_before = path / "checkpoint.before.safetensors"
        self._checkpoint_new = path / "checkpoint.new.safetensors"
        self._damaged = False  # the newest checkpoint is damaged, so it must not replace the one before it

    def save_ticket(self, ticket: Ticket) -> None:
        """Write ``ticket.safetensors``: mask/ as uint8 0/1, loc/, scale/, net/."""
        self.path.mkdir(parents=True, exist_ok=True)
        ticket.save(self.path / TICKET)

    def load_ticket(self) -> Ticket:
        """Read ``ticket.safetensors``."""
        return Ticket.load(self.path / TICKET)

    def save_posterior(self, posterior: Posterior, net: Sites) -> None:
        """Write ``posterior.safetensors``: loc/, scale/, net/."""
        self.path.mkdir(parents=True, exist_ok=True)
        posterior.save(self.path / POSTERIOR, net)

    def load_posterior(self) -> tuple[Posterior, Sites]:
        """Read ``posterior.safetensors``: the posterior, and what is not random."""
        return Posterior.load(self.path / POSTERIOR)

    def save_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write ``history.csv``: one row per epoch."""
        files.write_atomic(self.path / HISTORY, as_csv(list(history[0]), history))

    def load_history(self) -> list[dict[str, float]]:
        """Read ``history.csv``; ``UserError`` for another table."""
        path = self.path / HISTORY
        try:
            rows = list(csv.DictReader(untrusted.read_text(path).splitlines(), strict=True))
            return [{n: float(v) for n, v in row.items() if n != files.CRC} for row in rows]
        except (csv.Error, TypeError, ValueError) as error:
            raise UserError(f"{path} is not one of our tables ({one_line(error)})") from error

    def save_checkpoint(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write a checkpoint within the level and read it again; only then does the last one become the one before."""
        self.path.mkdir(parents=True, exist_ok=True)
        files.save_tensors(self._checkpoint_new, tensors, info)
        untrusted.load_tensors(self._checkpoint_new)
        if self.checkpoint.exists() and not self._damaged:
            files.replace(self.checkpoint, self.checkpoint_before)
        files.replace(self._checkpoint_new, self.checkpoint)
        self._damaged = False

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or None; a warning names a damaged one, which is passed over."""
        for path in (self.checkpoint, self.checkpoint_before):
            try:
                tensors, info = untrusted.load_tensors(path)
                if not all(all_finite(name, t, info) for name, t in tensors.items()):
                    raise Damaged(f"{path} holds values that are not finite")
                return tensors, info
            except FileNotFoundError:
                continue
            except Damaged as error:
                self._damaged = True
                warnings.warn(
                    f"{error}; going on from the checkpoint before it, or from the level's start", stacklevel=2
                )
        return None

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints of a finished level."""
        for path in (self.checkpoint, self.checkpoint_before, self._checkpoint_new):
            path.unlink(missing_ok=True)

    def save_divergence(self, what: Mapping[str, Any]) -> None:
        """Write ``diverged.json``: where the level's first training diverged, and the learning rate of the second."""
        files.write_object(self.path / "diverged.json", what)

    def load_divergence(self) -> dict[str, Any] | None:
        """Read ``diverged.json``; None if the level is in its first training."""
        path = self.path / "diverged.json"
        try:
            return untrusted.read_object(path) if path.exists() else None
        except UserError as error:
            raise Damaged(f"{error}; remove it to begin the level anew") from error

    def finish(self, result: LevelResult, ticket: int, rewind: bool = False) -> None:
        """Write ``level.json``: from now on the level is finished, with the files that are there now.

        ``ticket`` is the checksum of the ticket that it was trained from; ``rewind`` counts the rewind point among its
        files.
        """
        names = (TICKET, POSTERIOR, HISTORY, *([REWIND] if rewind else []))
        Manifest(result, ticket, {name: files.crc32_of(self.path / name) for name in names}).save(self.path / MANIFEST)

    def manifest(self) -> Manifest | None:
        """Read ``level.json``; None if the level is not finished, ``Damaged`` if the file is not whole."""
        return Manifest.load(self.path / MANIFEST)

    def check(self, epochs: int) -> Manifest | None:
        """The manifest of a finished level, after a look at all its files; None if the level is not finished.

        Raises ``Damaged`` unless each file has the manifest's checksum, and unless what they hold agrees: the mask with
        the row, the posterior with the mask, and the history with the number of ``epochs``.
        """
        manifest = self.manifest()
        if manifest is None:
            return None
        if not {TICKET, POSTERIOR, HISTORY} <= manifest.files.keys() <= {TICKET, POSTERIOR, HISTORY, REWIND}:
            raise Damaged(f"{self.path / MANIFEST} lists other files than a level has: {', '.join(manifest.files)}")
        for name, expected in manifest.files.items():
            try:
                found = files.crc32_of(self.path / name)
            except FileNotFoundError as error:
                raise Damaged(f"{self.path / name} is missing") from error
            if found != expected:
                raise Damaged(f"{self.path / name} is not the file that {MANIFEST} was written for")
        self.check_content(manifest.result, epochs)
        return manifest

    def check_content(self, row: LevelResult, epochs: int) -> None:
        """Raise ``Damaged`` unless the level's files agree with its row, and with each other."""
        try:
            ticket, (posterior, _), history = self.load_ticket(), self.load_posterior(), self.load_history()
        except (FileNotFoundError, UserError) as error:
            raise Damaged(str(error)) from error
        kept = masks.remaining(ticket.mask), masks.total(ticket.mask)
        if kept != (row.remaining, row.total):
            raise Damaged(
                f"{self.path}'s mask keeps {kept[0]} of {kept[1]} weights, its row {row.remaining} of {row.total}"
            )
        if {n: t.shape for n, t in posterior.loc.items()} != {n: t.shape for n, t in ticket.start.loc.items()}:
            raise Damaged(f"{self.path}'s posterior has other sites than its ticket")
        if any(bool(posterior.loc[name][~mask].any()) for name, mask in ticket.mask.items()):
            raise Damaged(f"{self.path}'s posterior has weights that its ticket has pruned")
        if len(history) != epochs:
            raise Damaged(f"{self.path / HISTORY} has {len(history)} of {epochs} epochs")

    def has_files(self) -> bool:
        """Whether the files of a finished level are there; :meth:`check` tells whether they are whole."""
        return all((self.path / name).is_file() for name in (TICKET, POSTERIOR, HISTORY))

    def set_aside(self) -> None:
        """Move the level to ``level_NN.damaged/``, if there is none yet: another machine may be able to read it.

        What its learning rate was halved for, ``diverged.json``, stays.
        """
        aside = self.path.with_name(f"{self.path.name}.damaged")
        if aside.exists():
            (self.path / MANIFEST).unlink(missing_ok=True)
            return
        self.path.rename(aside)
        if (aside / "diverged.json").exists():
            self.path.mkdir()
            (aside / "diverged.json").rename(self.path / "diverged.json")


class RunFolder:
    """A run: ``config.json``, one folder per level, and ``results.csv``, which is written from the levels' manifests."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def is_new(self) -> bool:
        """Whether the folder holds no run yet; ``UserError`` if it holds anything else."""
        if (self.path / "config.json").exists():
            return False
        if self.path.exists() and any(not _MADE_FIRST.fullmatch(p.name) for p in self.path.iterdir()):
            raise UserError(f"--run-dir {self.path} is not empty and holds no run; choose another folder")
        return True

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``: every option, and the facts recorded when the run began."""
        files.write_object(self.path / "config.json", config)

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds; ``UserError`` if there is none, or if it is damaged."""
        path = self.path / "config.json"
        if not path.exists():
            raise UserError(f"{self.path} is not a run folder: it has no config.json")
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
        """``control`` or ``transplant``, as the folder's tickets were made; empty if they were made by pruning."""
        config = self.config
        return next((name for name in ORIGINS if name in config), "")

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder; ``Busy`` if one is at work in it."""
        return locked(self.path)

    def busy(self) -> bool:
        """Whether another process is at work in the folder now."""
        return is_busy(self.path)

    def level(self, number: int) -> LevelFolder:
        """The folder of one level."""
        return LevelFolder(self.path / f"level_{number:02d}")

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
        """Whether tickets are rewound to a later moment than the start of level 0."""
        return str(self.config.get("rewind", "")).startswith(("epoch:", "restart:"))

    def load_rewind_point(self) -> tuple[Posterior, Sites]:
        """What a rewound ticket goes back to: all weights at level 0's start, or after K of its epochs."""
        if self.rewinds_late:
            return self.rewind_point.load_posterior()
        first = self.level(0).load_ticket()
        return first.start, first.net

    def results(self) -> list[LevelResult]:
        """The rows of all finished levels, in order; ``UserError`` names a manifest that is damaged."""
        rows = {row.level: row for row in first_version.rows(self.path / "results.csv")}
        for number in self.levels():
            try:
                manifest = self.level(number).manifest()
            except Damaged as error:
                raise UserError(f"{error}; the run's command trains the level again") from error
            if manifest is not None and manifest.result.level != number:
                raise UserError(f"{self.level(number).path} holds the manifest of level {manifest.result.level}")
            if manifest is not None:
                rows[number] = manifest.result
        return [rows[number] for number in sorted(rows)]

    def finished(self) -> list[LevelResult]:
        """The rows of all finished levels; ``UserError`` if there is none yet."""
        rows = self.results()
        if not rows:
            raise UserError(f"{self.path} has no finished level yet")
        return rows

    def write_results(self) -> None:
        """Write ``results.csv`` from the manifests, unless it holds just that."""
        path, rows = self.path / "results.csv", [asdict(row) for row in self.results()]
        text = as_csv(list(COLUMNS), rows) if rows else b""
        if rows and not (path.is_file() and path.read_bytes() == text):
            files.write_atomic(path, text)
        elif not rows:
            path.unlink(missing_ok=True)

    def drop_leftovers(self) -> None:
        """Remove temporary files of processes that were killed while they wrote."""
        for folder in (self.path, self.rewind_point.path, *(self.level(number).path for number in self.levels())):
            for leftover in folder.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(leftover.name):
                    leftover.unlink()

    def derived(self, *names: str) -> RunFolder:
        """The folder within this one of tickets made from this run's, ``controls/reinit`` for instance."""
        folder = self.path
        for name in names:
            folder = folder / name
            if folder.is_symlink():
                raise UserError(
                    f"{folder} is a link, which may lead out of the run; put the folder itself in its place"
                )
        return RunFolder(folder)

    def figure(self, name: str) -> Path:
        """The file of one of the run's figures."""
        return self.path / f"{name}.png"

    def evaluation_figure(self, name: str) -> Path:
        """The file of a figure of an evaluation."""
        return self.path / "evaluation" / f"{name}.png"

    def save_evaluation(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write a table of ``python -m pyro_lottery.evaluate`` to ``evaluation/NAME.csv``; rows of other levels that are there
        stay. Returns all rows.
        """
        import pandas as pd

        path, found = self.path / "evaluation" / f"{name}.csv", pd.DataFrame(rows)
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            with suppress(ValueError, KeyError, TypeError):  # nothing is kept of a file that is no such table
                # A class may be called NA, or 1.
                old = pd.read_csv(path, dtype={"class": str}, keep_default_na=False, na_values=[""])
                found = pd.concat([old[~old["level"].isin(found["level"])], found]).sort_values("level", kind="stable")
        files.write_atomic(path, found.to_csv(index=False).encode())
        return found.to_dict("records")  # type: ignore[return-value]


def as_csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A table of numbers as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
