"""Whether a command may resume a run folder: options, data and origin must be the same; other differences give a warning."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from pyro_lottery.errors import Damaged, UserError
from pyro_lottery.runs import first_version
from pyro_lottery.runs.build import PRETRAINED
from pyro_lottery.runs.config import LATER, RESUMABLE, Config
from pyro_lottery.runs.folder import ORIGINS, RunFolder
from pyro_lottery.runs.lock import not_writable
from pyro_lottery.types import ticket_checksum

_LATER = ("options", "log_prior", "score")
"""Facts that runs have not recorded from the beginning."""
_OWN = {
    "initial_values": "network, or from other initial values", "options": "rate of dropout, or another option of the network's modules", "log_joint": "network, prior or likelihood",
    "log_prior": "prior",
    "log_scales": "guide or initial scale", "score": "score",
}  # fmt: skip
"""Facts that distinguish runs made in Python, and what differs if a fact does."""


def open_folder(run: RunFolder, options: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Create the run folder ``run`` with these ``options``, or resume it.

    ``facts`` (data, versions, hardware) are recorded when the folder is created, and compared when it is resumed. Raises
    ``UserError`` if the folder belongs to another run, naming what differs.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        if run.is_new:
            run.save_config({**options, **facts})
            return
        old = LATER | run.config
        _check(run, old, json.loads(json.dumps(options)), json.loads(json.dumps(facts)))
        if options["levels"] > old["levels"]:
            run.save_config(old | {"levels": options["levels"]})
    except OSError as error:
        raise not_writable(run.path, error) from error


def check_begun(run: RunFolder, options: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if ``run`` was begun with other ``options``, before data are loaded that a mistaken command would not need."""
    if (run.path / "config.json").is_file():
        _check_options(
            run, LATER | run.config, json.loads(json.dumps(options)), {"precision"}
        )  # which auto chooses later


def _check_options(run: RunFolder, old: dict[str, Any], options: dict[str, Any], without: Collection[str] = ()) -> None:
    where = f"--run-dir {run.path}"
    for name, value in options.items():
        if name in without:
            continue
        if name not in old and name not in RESUMABLE - {"levels"}:
            raise UserError(f"{run.path / 'config.json'} has no option {name}; choose another --run-dir")
        if name not in RESUMABLE and old[name] != value:
            raise UserError(
                f"{where} was started with other options: {name} was {old[name]}, now it is {value}; choose another "
                "--run-dir, or give the options of that run"
            )


def _check(run: RunFolder, old: dict[str, Any], options: dict[str, Any], facts: dict[str, Any]) -> None:
    where = f"--run-dir {run.path}"
    _check_options(run, old, options)
    if type(old["levels"]) is not int:
        raise UserError(f"{run.path / 'config.json'}: levels is {old['levels']!r}; expected a whole number")
    for name in ORIGINS:
        if old.get(name) != facts.get(name):
            raise UserError(f"{where} holds tickets of another {name}; choose another --run-dir")
    if old.get(PRETRAINED) != facts.get(PRETRAINED):
        there, here = (f"the weights {f[PRETRAINED]}" if PRETRAINED in f else "random values" for f in (old, facts))
        raise UserError(
            f"{where} was started from {there}, but --pretrained gives {here}; choose another --run-dir, or the weights of that run"
        )
    if old.get("data") != facts.get("data"):
        raise UserError(
            f"{where} was trained on other data than --data-dir {options['data_dir']} has now; choose another --run-dir, "
            "or the data of that run"
        )
    _check_own(where, old.get("own"), facts.get("own"))
    check_unchanged(where, old, facts)
    _warn_of_changes(run, old, facts)


def _check_own(where: str, old: Any, now: Any) -> None:
    """Raise ``UserError`` if the run was started with another network, prior, likelihood, guide or score made in Python."""
    if what := differs(old, now):
        raise UserError(
            f"{where} was started with another {what}; build the network after torch.manual_seed, or choose another folder"
        )


def check_unchanged(where: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if the code that a run's ``config.json`` names is not what it was when the run was started, by :func:`code_facts`."""
    if "code" in config and (what := differs(config["code"], facts.get("code"))):
        raise UserError(
            f"{where} was started with other code at the import paths of its --arch, --prior, --guide or --score: another {what}; restore that code, or "
            "choose another folder"
        )


def differs(old: Any, now: Any) -> str:
    """What differs between two fingerprints, those of a run and of the code as it is now, in words; empty if nothing does."""
    for name, value in (now or {}).items():
        before: Any = old.get(name) if isinstance(old, dict) else None
        if name in _LATER and isinstance(old, dict) and name not in old:
            continue
        if not _near(before, value):
            shown = "" if isinstance(value, list) else f" ({name} was {before}, now it is {value})"
            return f"{_OWN.get(name, name)}{shown}"
    return ""


def _near(before: Any, now: Any) -> bool:
    if isinstance(now, list):  # of sites, whose rounding is smaller than that of their sum
        return isinstance(before, list) and len(before) == len(now) and all(map(_near_site, before, now))
    tolerance = 0.0 if isinstance(now, int) else 1e-4  # a checksum is equal or not
    return type(before) in (int, float) and math.isclose(before, now, rel_tol=tolerance, abs_tol=tolerance)


def _near_site(before: Any, now: float) -> bool:
    return type(before) in (int, float) and math.isclose(before, now, rel_tol=1e-5, abs_tol=1e-3)


def _warn_of_changes(run: RunFolder, old: dict[str, Any], facts: dict[str, Any]) -> None:
    """Warn of changes that may change the last bits of training: versions, hardware, kernels and random streams."""
    for name in ("versions", "hardware", "kernels", "streams"):
        now = facts.get(name, {})
        for key, value in (now if isinstance(now, dict) else {"": now}).items():
            before = old.get(name, value) if not key else old.get(name, {}).get(key, value)
            if before != value:
                what = " ".join([name, key]).strip()
                warnings.warn(
                    f"{run.path} was started with {what} = {before}, now it is {value}: training may differ in its last bits",
                    stacklevel=2,
                )
    if old.get("classes") not in (None, facts.get("classes")):
        warnings.warn(f"{run.path} was started when the classes were named {old['classes']}", stacklevel=2)


def adopt(run: RunFolder, config: Config) -> None:
    """Write the manifests of the finished levels of a folder of version 0.1.0; a damaged level is set aside with a warning."""
    table = run.path / "results.csv"
    for row in first_version.rows(table):
        level = run.level(row.level)
        try:
            if level.manifest() is not None:  # by an earlier call that was killed before it finished
                continue
            epochs = config.epochs_of(row.level)
            if len(first_version.table(level.path / "history.csv")) != epochs:
                raise Damaged(f"{level.path / 'history.csv'} has fewer than {epochs} undamaged epochs")
            found = level.read(row, epochs)
            rewind = row.level == 0 and run.rewinds_late
            if rewind:
                run.rewind_point.load_posterior()
            level.finish(row, ticket_checksum(found.ticket), rewind)
        except (FileNotFoundError, Damaged) as error:
            warnings.warn(f"{error}; level {row.level} is trained again", stacklevel=2)
            if level.path.exists():
                level.set_aside()
    if first_version.is_first(table):
        table.unlink()  # the session then writes it from the manifests
