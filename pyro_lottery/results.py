"""The run folder: every file name, every format and the rule by which a run is resumed. Nothing else touches it."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import filelock
import safetensors
from torch import Tensor

from pyro_lottery import files
from pyro_lottery.errors import Busy, Damaged, UserError
from pyro_lottery.types import LevelResult, Mask, Posterior, Sites, Ticket

ORIGINS = ("control", "transplant")
"""Facts of ``config.json`` that say from what, and how, the tickets of a folder were made, if not by pruning."""
RESUMABLE = {"levels", "data_dir", "run_dir", "device"}
"""Options that may differ when a run is resumed: they say how far and where, not what."""


class LevelFolder:
    """``level_NN/``: what a level starts from, what it trained to, its epochs, and a checkpoint while it trains."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.checkpoint_before = path / "checkpoint.before.safetensors"
        self._damaged = False  # whether the newest checkpoint is, and must not replace the one before it

    def save_ticket(self, ticket: Ticket) -> None:
        """Write ``ticket.safetensors``: mask/ as uint8 0/1, loc/, scale/, net/."""
        self.path.mkdir(parents=True, exist_ok=True)
        ticket.save(self.path / "ticket.safetensors")

    def load_ticket(self) -> Ticket:
        """Read ``ticket.safetensors``."""
        return Ticket.load(self.path / "ticket.safetensors")

    def load_mask(self) -> Mask:
        """The mask of ``ticket.safetensors`` alone, without reading the rest of the file."""
        path = self.path / "ticket.safetensors"
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = json.loads(file.metadata()["pyro_lottery"])["info"]["prunable"]
                return {name: file.get_tensor(f"mask/{name}").bool() for name in names}
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path} cannot be read: {error}") from error

    def save_posterior(self, posterior: Posterior, net: Sites) -> None:
        """Write ``posterior.safetensors``: loc/, scale/, net/."""
        self.path.mkdir(parents=True, exist_ok=True)
        posterior.save(self.path / "posterior.safetensors", net)

    def load_posterior(self) -> tuple[Posterior, Sites]:
        """Read ``posterior.safetensors``: the posterior, and what is not random."""
        return Posterior.load(self.path / "posterior.safetensors")

    def save_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write ``history.csv``: one row per epoch."""
        _write_csv(self.path / "history.csv", list(history[0]) if history else ["epoch"], history)

    def load_history(self) -> list[dict[str, float]]:
        """Read ``history.csv``."""
        return _read_csv(self.path / "history.csv")

    def save_checkpoint(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write a checkpoint within the level; the one before is kept until the next."""
        if self.checkpoint.exists() and not self._damaged:
            self.checkpoint.replace(self.checkpoint_before)
        self._damaged = False
        self.path.mkdir(parents=True, exist_ok=True)
        files.save_tensors(self.checkpoint, tensors, info)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or None; a damaged one is passed over with a warning that names it."""
        for path in (self.checkpoint, self.checkpoint_before):
            try:
                return files.load_tensors(path)
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
        self.checkpoint.unlink(missing_ok=True)
        self.checkpoint_before.unlink(missing_ok=True)


class RunFolder:
    """A run: ``config.json``, ``results.csv`` and one folder per level. A level is finished when its row is there."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def open(self, options: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Create a run folder, or resume one with the same options and data; ``UserError`` names what differs.

        ``facts`` (data, versions, hardware) are recorded when the folder is made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--run-dir {self.path} is a file; choose a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.rglob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            if (self.path / "config.json").exists():
                self._resume(json.loads(json.dumps(options)), json.loads(json.dumps(facts)))
            elif any(p.name != ".lock" for p in self.path.iterdir()):
                raise UserError(f"--run-dir {self.path} is not empty and holds no run; choose another folder")
            else:
                files.write_json(self.path / "config.json", dict(options) | dict(facts))
        except OSError as error:
            raise UserError(
                f"--run-dir {self.path} cannot be written ({error.strerror}); choose another folder"
            ) from error

    def _resume(self, options: dict[str, Any], facts: dict[str, Any]) -> None:
        old = self.config
        missing = [name for name in options if name not in old]
        if missing:
            raise UserError(f"{self.path / 'config.json'} lacks the option {missing[0]}; choose another --run-dir")
        for name, value in options.items():
            if name not in RESUMABLE and old[name] != value:
                raise UserError(
                    f"--run-dir {self.path} belongs to other options: {name} is {old[name]} there and {value} here; "
                    "choose another --run-dir, or repeat the run's own options"
                )
        for name in ORIGINS:
            if old.get(name) != facts.get(name):
                raise UserError(f"--run-dir {self.path} holds tickets of another {name}; choose another --run-dir")
        if old.get("data") != facts.get("data"):
            raise UserError(
                f"--run-dir {self.path} was trained on other data than --data-dir {options['data_dir']} holds now; "
                "choose another --run-dir, or the run's own data"
            )
        for row in self.results():  # a kill may have come between a level's row and the end of its checkpoints
            self.level(row.level).drop_checkpoints()
        if options["levels"] > old["levels"]:
            files.write_json(self.path / "config.json", old | {"levels": options["levels"]})

    def busy(self) -> bool:
        """Whether another process is at work in the folder now."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with self.lock():
                return False
        except Busy:
            return True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder; ``UserError`` if one is at work in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise Busy(f"another process is at work in --run-dir {self.path}; wait for it, or choose another") from None
        except OSError as error:
            raise UserError(
                f"--run-dir {self.path} cannot be written ({error.strerror}); choose another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def figure(self, name: str) -> Path:
        """Where a picture of the run goes."""
        return self.path / f"{name}.png"

    def evaluation_figure(self, name: str) -> Path:
        """Where a picture of what an evaluation found goes."""
        return self.path / "evaluation" / f"{name}.png"

    def save_evaluation(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write a table of what ``python -m pyro_lottery.evaluate`` found to ``evaluation/NAME.csv``; rows that are there
        of other levels stay. Returns all rows.
        """
        import pandas as pd

        path, found = self.path / "evaluation" / f"{name}.csv", pd.DataFrame(rows)
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            with suppress(ValueError, KeyError):  # of a table that is none, nothing is kept
                old = pd.read_csv(path)
                found = pd.concat([old[~old["level"].isin(found["level"])], found]).sort_values("level", kind="stable")
        files.write_atomic(path, found.to_csv(index=False).encode())
        return found.to_dict("records")  # type: ignore[return-value]

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds: every option, and the facts recorded when the run began."""
        try:
            config = json.loads((self.path / "config.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a run folder: it has no config.json") from None
        except ValueError as error:
            raise UserError(f"{self.path / 'config.json'} is not JSON ({error})") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.path / 'config.json'} is not a JSON object")
        return config

    @property
    def origin(self) -> str:
        """Whether the folder's tickets are a ``control`` or a ``transplant``, or empty: made by pruning."""
        config = self.config
        return next((name for name in ORIGINS if name in config), "")

    def level(self, number: int) -> LevelFolder:
        """The folder of one level."""
        return LevelFolder(self.path / f"level_{number:02d}")

    @property
    def rewind_point(self) -> LevelFolder:
        """The folder of the posterior that late rewinding goes back to."""
        return LevelFolder(self.path / "rewind")

    def load_rewind_point(self) -> tuple[Posterior, Sites]:
        """What all weights of a rewound ticket go back to: the values at level 0's start, or after K of its epochs."""
        if self.rewind_point.path.exists():
            return self.rewind_point.load_posterior()
        first = self.level(0).load_ticket()
        return first.start, first.net

    def derived(self, *names: str) -> RunFolder:
        """The folder within this one of tickets made from this run's, ``controls/reinit`` for instance."""
        return RunFolder(self.path.joinpath(*names))

    def results(self) -> list[LevelResult]:
        """The rows of ``results.csv``, in order of level."""
        if not (self.path / "results.csv").exists():
            return []
        integers = {"level", "remaining", "total"}
        names = [f.name for f in fields(LevelResult)]
        try:
            rows = _read_csv(self.path / "results.csv")
            values: list[dict[str, Any]] = [{n: int(r[n]) if n in integers else r.get(n) for n in names} for r in rows]
            return [LevelResult(**value) for value in values]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path / 'results.csv'} is not a table of levels ({error})") from error

    def finished(self) -> list[LevelResult]:
        """The rows of ``results.csv``; ``UserError`` if there is none yet."""
        rows = self.results()
        if not rows:
            raise UserError(f"{self.path} has no finished level yet")
        return rows

    def add_result(self, result: LevelResult) -> None:
        """Add a level's row: from now on the level is finished."""
        rows = [asdict(row) for row in sorted([*self.results(), result], key=lambda row: row.level)]
        _write_csv(self.path / "results.csv", [f.name for f in fields(LevelResult)], rows)


def _write_csv(path: Path, names: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_atomic(path, text.getvalue().encode())


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        return [{k: float(v) if v not in ("", None) else None for k, v in row.items()} for row in csv.DictReader(file)]
