"""The run folder: every file name, every format and the rule by which a run is resumed. Nothing else touches it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from pyro_lottery import files, sealed
from pyro_lottery.errors import Busy, Damaged, UserError, one_line
from pyro_lottery.types import LevelResult, Posterior, Sites, Ticket, all_finite

ORIGINS = ("control", "transplant")
"""Facts of ``config.json`` that say from what, and how, the tickets of a folder were made, if not by pruning."""
PRETRAINED = "pretrained_checksum"
"""Fact of ``config.json`` that says from which weights a run of ``--pretrained`` began, wherever their file is."""
RESUMABLE = {
    "levels", "data_dir", "run_dir", "device", "on_divergence", "deterministic", "pretrained", "pretrained_key",
}  # fmt: skip
"""Options that may differ when a run is resumed: they say how far, where and how carefully, not what."""
LATER = {
    "devices": 1, "num_nodes": 1, "strategy": "ddp", "parallel": "data", "sync_batchnorm": False, "kl_warmup_epochs": 0,
    "image_size": None,
}  # fmt: skip
"""Options that older runs do not name, and what they were then."""


_OWN = {
    "initial_values": "network, or from other initial values", "log_joint": "network, prior or likelihood",
    "log_scales": "guide or initial scale", "score": "score",
}  # fmt: skip
"""What tells runs apart that were made in Python, and what differs where it does."""
_OF_CLASSES = ("test_accuracy", "max_test_accuracy", "mace", "ece", "brier")
_OF_REAL_TARGETS = ("rmse", "coverage_50", "coverage_80", "coverage_95")
"""What is measured of every level."""


def first_epoch(rewind: str, level: int) -> int:
    """The epoch, counted from 0, at which ``level`` begins to train: K with ``--rewind epoch:K`` but for level 0.

    A level then trains the epochs K+1 to the last, with their learning rates and random streams (Frankle et al. 2020,
    Linear Mode Connectivity and the Lottery Ticket Hypothesis).
    """
    return int(rewind.removeprefix("epoch:")) if level and rewind.startswith("epoch:") else 0


_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_OURS = re.compile(r"\.lock|\.owner|\.(config\.json|\.owner)\.\d+\.tmp")
"""What may be in a folder that is still to become a run."""


class LevelFolder:
    """``level_NN/``: what a level starts from, what it trained to, its epochs, and a checkpoint while it trains."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.checkpoint_before = path / "checkpoint.before.safetensors"
        self._checkpoint_new = path / "checkpoint.new.safetensors"
        self._damaged = False  # whether the newest checkpoint is, and must not replace the one before it

    def save_ticket(self, ticket: Ticket) -> None:
        """Write ``ticket.safetensors``: mask/ as uint8 0/1, loc/, scale/, net/."""
        self.path.mkdir(parents=True, exist_ok=True)
        ticket.save(self.path / "ticket.safetensors")

    def load_ticket(self) -> Ticket:
        """Read ``ticket.safetensors``."""
        return Ticket.load(self.path / "ticket.safetensors")

    def save_posterior(self, posterior: Posterior, net: Sites) -> None:
        """Write ``posterior.safetensors``: loc/, scale/, net/."""
        self.path.mkdir(parents=True, exist_ok=True)
        posterior.save(self.path / "posterior.safetensors", net)

    def load_posterior(self) -> tuple[Posterior, Sites]:
        """Read ``posterior.safetensors``: the posterior, and what is not random."""
        return Posterior.load(self.path / "posterior.safetensors")

    def save_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write ``history.csv``: one row per epoch."""
        sealed.write_table(self.path / "history.csv", list(history[0]), history)

    def load_history(self) -> list[dict[str, float]]:
        """Read ``history.csv``."""
        return sealed.read_table(self.path / "history.csv")

    def save_checkpoint(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write a checkpoint within the level and read it again; only then the last one becomes the one before."""
        self.path.mkdir(parents=True, exist_ok=True)
        files.save_tensors(self._checkpoint_new, tensors, info)
        files.load_tensors(self._checkpoint_new)
        if self.checkpoint.exists() and not self._damaged:
            files.replace(self.checkpoint, self.checkpoint_before)
        files.replace(self._checkpoint_new, self.checkpoint)
        self._damaged = False

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or None; a damaged one is passed over with a warning that names it."""
        for path in (self.checkpoint, self.checkpoint_before):
            try:
                tensors, info = files.load_tensors(path)
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

    def set_aside(self) -> None:
        """Keep the files of a damaged level in ``level_NN.damaged/``, the first time: what was taken for damage may be whole
        elsewhere. How its learning rate was found stays.
        """
        aside = self.path.with_name(f"{self.path.name}.damaged")
        if self.path.exists() and not aside.exists():
            self.path.rename(aside)
            diverged = aside / "diverged.json"
            if diverged.exists():
                self.path.mkdir()
                diverged.rename(self.path / "diverged.json")

    def is_there(self) -> bool:
        """Whether the level has its three files; whether they are whole, :meth:`check` tells."""
        names = ("ticket.safetensors", "posterior.safetensors", "history.csv")
        return all((self.path / name).is_file() for name in names)

    def save_divergence(self, what: Mapping[str, Any]) -> None:
        """Write ``diverged.json``: where the level's first training met a loss that is not finite, and the learning rate
        of the second.
        """
        sealed.write_object(self.path / "diverged.json", what)

    def load_divergence(self) -> dict[str, Any] | None:
        """Read ``diverged.json``; None where the level is in its first training."""
        path = self.path / "diverged.json"
        try:
            return sealed.read_object(path) if path.exists() else None
        except UserError as error:
            raise Damaged(f"{error}; remove it to begin the level anew") from error

    def check(self, row: LevelResult, epochs: int) -> None:
        """Raise ``Damaged`` unless the level's files are whole and agree with its row of ``results.csv``."""
        try:
            ticket, (posterior, _), history = self.load_ticket(), self.load_posterior(), self.load_history()
        except (FileNotFoundError, UserError) as error:
            raise Damaged(str(error)) from error
        remaining, total = (sum(int(count(m)) for m in ticket.mask.values()) for count in (Tensor.sum, Tensor.numel))
        if (remaining, total) != (row.remaining, row.total):
            raise Damaged(
                f"{self.path}'s mask keeps {remaining} of {total} weights, its row {row.remaining} of {row.total}"
            )
        if {n: t.shape for n, t in posterior.loc.items()} != {n: t.shape for n, t in ticket.start.loc.items()}:
            raise Damaged(f"{self.path}'s posterior has other sites than its ticket")
        if any(bool(posterior.loc[name][~mask].any()) for name, mask in ticket.mask.items()):
            raise Damaged(f"{self.path}'s posterior has weights that its ticket has pruned")
        if len(history) != epochs:
            raise Damaged(f"{self.path / 'history.csv'} has {len(history)} of {epochs} epochs")


def _density(row: Mapping[str, Any]) -> float:
    return row["remaining"] / row["total"] if row["total"] else 1.0  # as masks.density


class RunFolder:
    """A run: ``config.json``, ``results.csv`` and one folder per level. A level is finished when its row is there."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def open(self, options: Mapping[str, Any], facts: Mapping[str, Any], levels: Sequence[int] | None = None) -> None:
        """Create a run folder, or resume one with the same options and data; ``UserError`` names what differs.

        ``facts`` (data, versions, hardware) are recorded when the folder is made. Those of ``levels`` (all) whose files
        are damaged are no longer finished.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / "config.json").exists():
                self._resume(json.loads(json.dumps(options)), json.loads(json.dumps(facts)), levels)
            elif any(not _OURS.fullmatch(p.name) for p in self.path.iterdir()):
                raise UserError(f"--run-dir {self.path} is not empty and holds no run; choose another folder")
            else:
                self._write_config(dict(options) | dict(facts))
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> Exception:
        if isinstance(error, FileExistsError):
            return UserError(f"--run-dir {self.path} is a file; choose a folder")
        if not files.is_refused(error):
            return error  # of a full or failing disk: no other option would help
        return UserError(
            f"{self.path} cannot be written ({error.strerror}); make it writable, or choose another folder"
        )

    def _write_config(self, config: Mapping[str, Any]) -> None:
        sealed.write_object(self.path / "config.json", config)

    def _resume(self, options: dict[str, Any], facts: dict[str, Any], levels: Sequence[int] | None) -> None:
        old: dict[str, Any] = LATER | self.config
        self._check_rewind(options)
        for folder in (self.path, self.rewind_point.path, *self.path.glob("level_*")):
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                if _TEMPORARY.fullmatch(leftover.name):
                    leftover.unlink()
        missing = [name for name in options if name not in old and name not in RESUMABLE - {"levels"}]
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
        if old.get(PRETRAINED) != facts.get(PRETRAINED):
            there, here = (
                f"the weights {found[PRETRAINED]}" if PRETRAINED in found else "random values" for found in (old, facts)
            )
            raise UserError(
                f"--run-dir {self.path} was begun from {there}, and --pretrained gives {here}; choose another --run-dir, or the "
                "run's own weights"
            )
        if old.get("data") != facts.get("data"):
            raise UserError(
                f"--run-dir {self.path} was trained on other data than --data-dir {options['data_dir']} holds now; "
                "choose another --run-dir, or the run's own data"
            )
        self._check_own(old.get("own"), facts.get("own"))
        if facts.get("streams") != old.get("streams"):
            self.check_subsets()
            warnings.warn(
                f"{self.path} was begun by an earlier version: what is trained now draws other random numbers",
                stacklevel=2,
            )
        for name in ("versions", "hardware", "kernels"):
            now = facts.get(name, {})
            for key, value in (now if isinstance(now, dict) else {"": now}).items():
                before = old.get(name, value) if not key else old.get(name, {}).get(key, value)
                if before != value:
                    warnings.warn(
                        f"{self.path} was begun with {' '.join([name, key]).strip()} = {before}, here it is {value}: what is trained "
                        "now may differ in its last bits",
                        stacklevel=2,
                    )
        if old.get("classes") not in (None, facts.get("classes")):
            warnings.warn(f"{self.path} was begun when the classes had the names {old['classes']}", stacklevel=2)
        if type(old["levels"]) is not int:
            raise UserError(f"{self.path / 'config.json'}: levels is {old['levels']!r}, not a whole number")
        self._drop_damaged(options, levels)
        if options["levels"] > old["levels"]:
            self._write_config(old | {"levels": options["levels"]})

    def _check_own(self, old: Any, now: Any) -> None:
        """Raise ``UserError`` where the run was begun with another network, prior, likelihood or guide made in Python."""
        for name, value in (now or {}).items():
            before: Any = old.get(name) if isinstance(old, dict) else None
            tolerance = 0.0 if isinstance(value, int) else 1e-4  # a checksum is equal or not
            if type(before) not in (int, float) or not math.isclose(
                before, value, rel_tol=tolerance, abs_tol=tolerance
            ):
                raise UserError(
                    f"--run-dir {self.path} was begun with another {_OWN.get(name, name)} ({name} is {before} there and {value} here); build "
                    "the network after torch.manual_seed, or choose another folder"
                )

    def _check_rewind(self, options: Mapping[str, Any]) -> None:
        """Raise ``UserError`` where an earlier version's ``epoch:K`` would be mixed with what it means now."""
        config = self.config
        here, given = str(config.get("rewind")), options.get("rewind")
        if _is_earlier(config) and here != given == here.replace("restart:", "epoch:"):
            raise UserError(
                f"{self.path} was begun by an earlier version, whose --rewind {given} is --rewind {here} now; go on with "
                "that, or choose another --run-dir"
            )

    def check_subsets(self) -> None:
        """Raise ``UserError`` where an earlier version drew the run's part of the images, which would be another now."""
        if not _is_earlier(self.config):
            return
        for name in ("train_size", "test_size", "val_fraction"):
            if self.config.get(name):
                raise UserError(
                    f"{self.path} was begun by an earlier version, which drew the images of --{name.replace('_', '-')} by "
                    "other random numbers; train it anew in another --run-dir, or go on with that version"
                )

    def _drop_damaged(self, options: Mapping[str, Any], levels: Sequence[int] | None) -> None:
        """Take the rows of levels whose files are damaged out of ``results.csv``, so that they are trained again."""
        rows, whole = self.results(repair=True), []
        for row in rows:
            try:
                if levels is None or row.level in levels:
                    epochs = options["epochs"] - first_epoch(str(options.get("rewind")), row.level)
                    self.level(row.level).check(row, epochs)
                    if row.level == 0 and self._rewinds_late:
                        self.rewind_point.load_posterior()
                whole.append(row)
            except (FileNotFoundError, Damaged) as error:
                warnings.warn(f"{error}; level {row.level} is trained again", stacklevel=2)
                self.level(row.level).set_aside()
        if whole != rows or not self._rows_are_whole():
            self._save_results(whole)
        for row in rows:  # a kill may have come between a level's row and the end of its checkpoints
            self.level(row.level).drop_checkpoints()

    def _rows_are_whole(self) -> bool:
        try:
            self.results()
        except UserError:
            return False
        return True

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
        """Keep other processes out of the folder; ``Busy`` with the owner's pid and host if one is at work in it.

        The lock is the operating system's, so that of a dead process is free.
        """
        owner = self.path / ".owner"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise Busy(
                f"another process{_named_in(owner)} is at work in {self.path}; wait for it, or choose another --run-dir"
            ) from None
        except OSError as error:
            raise self._not_writable(error) from error
        except NotImplementedError as error:
            raise UserError(f"{self.path} is on a file system without locks; choose another --run-dir") from error
        try:
            with suppress(OSError):  # the message is a courtesy: a full disk is reported by what matters
                # which replaces what is there: a link in a foreign folder is not followed
                files.write_atomic(owner, f"pid {os.getpid()} on {platform.node()}\n".encode())
            yield
        finally:
            with suppress(OSError):
                owner.unlink(missing_ok=True)
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
            with suppress(ValueError, KeyError, TypeError):  # of a table that is none, nothing is kept
                # a class may have the name NA, or 1
                old = pd.read_csv(path, dtype={"class": str}, keep_default_na=False, na_values=[""])
                found = pd.concat([old[~old["level"].isin(found["level"])], found]).sort_values("level", kind="stable")
        files.write_atomic(path, found.to_csv(index=False).encode())
        return found.to_dict("records")  # type: ignore[return-value]

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds: every option, and the facts recorded when the run began."""
        path = self.path / "config.json"
        if not path.exists():
            raise UserError(f"{self.path} is not a run folder: it has no config.json")
        config = sealed.read_object(path)
        if _is_earlier(config) and isinstance(rewind := config.get("rewind"), str):
            config["rewind"] = rewind.replace("epoch:", "restart:")  # what it meant then
        facts = {name: config.get(name, {}) for name in ("data", "versions", "hardware")}
        for name, value in facts.items():
            if not isinstance(value, dict):
                raise UserError(f"{path}: {name} is {value!r}; expected an object")
        for name in ORIGINS:
            if not isinstance(config.get(name, ""), str):
                raise UserError(f"{path}: {name} is {config[name]!r}; expected text")
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

    @property
    def _rewinds_late(self) -> bool:
        return str(self.config.get("rewind", "")).startswith(("epoch:", "restart:"))

    def load_rewind_point(self) -> tuple[Posterior, Sites]:
        """What all weights of a rewound ticket go back to: the values at level 0's start, or after K of its epochs."""
        if self._rewinds_late:
            return self.rewind_point.load_posterior()
        first = self.level(0).load_ticket()
        return first.start, first.net

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

    def results(self, repair: bool = False) -> list[LevelResult]:
        """The rows of ``results.csv``, in order of level; ``UserError`` for a table that is damaged or foreign, whose whole
        rows are kept with ``repair``, and the others warned of.
        """
        if not (self.path / "results.csv").exists():
            return []
        path, columns = self.path / "results.csv", {f.name: str(f.type) for f in fields(LevelResult)}
        try:
            rows: list[dict[str, Any]] = []
            for found in sealed.read_table(path, list(columns) if repair else None):
                if other := found.keys() - columns.keys():
                    raise UserError(f"{path} has a column {min(other)!r}; expected {', '.join(columns)}")
                rows.append({n: int(found[n]) if kind == "int" else found.get(n) for n, kind in columns.items()})
                if bad := [n for n, value in rows[-1].items() if value is not None and not math.isfinite(value)]:
                    raise UserError(f"{path} has {rows[-1][bad[0]]} as {bad[0]} of level {rows[-1]['level']}")
                if missing := [n for n, kind in columns.items() if rows[-1][n] is None and "None" not in kind]:
                    raise UserError(f"{path} has no {missing[0]} of level {rows[-1]['level']}")
            levels = [row["level"] for row in rows]
            if levels != sorted(set(levels)) or min(levels, default=0) < 0:
                raise UserError(f"{path} has the levels {levels}; expected each once, in order")
            for row in rows:
                known = _OF_REAL_TARGETS if row["test_accuracy"] is None else _OF_CLASSES
                if missing := [n for n in known if row[n] is None]:
                    raise UserError(f"{path} has no {missing[0]} of level {row['level']}")
                if not 0 <= row["remaining"] <= row["total"] or row["density"] != _density(row):
                    raise UserError(f"{path}: level {row['level']} keeps {row['remaining']} of {row['total']} weights")
            return [LevelResult(**row) for row in rows]
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a table of levels ({one_line(error)})") from error

    def finished(self) -> list[LevelResult]:
        """The rows of ``results.csv``; ``UserError`` if there is none yet."""
        rows = self.results()
        if not rows:
            raise UserError(f"{self.path} has no finished level yet")
        return rows

    def drop_result(self, level: int) -> None:
        """Take a level's row away: the level is no longer finished."""
        self._save_results(row for row in self.results() if row.level != level)

    def add_result(self, result: LevelResult) -> None:
        """Add a level's row: from now on the level is finished."""
        self._save_results(sorted([*self.results(), result], key=lambda row: row.level))

    def _save_results(self, results: Iterable[LevelResult]) -> None:
        rows = [asdict(row) for row in results]
        if not rows:
            (self.path / "results.csv").unlink(missing_ok=True)
            return
        sealed.write_table(self.path / "results.csv", [f.name for f in fields(LevelResult)], rows)


def _is_earlier(config: Mapping[str, Any]) -> bool:
    """Whether a run was begun by a version that drew other random numbers, and restarted the schedule after a late rewind."""
    return "streams" not in config


def _named_in(owner: Path) -> str:
    """Who holds a lock, in brackets; empty where its owner could not write so."""
    for _ in range(20):  # it does so just after it has the lock
        with suppress(OSError, ValueError):
            return f" ({files.read_text(owner).strip()[:100]})"
        time.sleep(0.05)
    return ""
