"""Which run folders a command may go on with: same options, same data, same origin; whatever else differs is warned of."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

from pyro_lottery.errors import UserError
from pyro_lottery.runs.build import PRETRAINED
from pyro_lottery.runs.config import LATER, RESUMABLE
from pyro_lottery.runs.folder import ORIGINS, RunFolder
from pyro_lottery.runs.lock import not_writable

_OWN = {
    "initial_values": "network, or from other initial values", "log_joint": "network, prior or likelihood",
    "log_scales": "guide or initial scale", "score": "score",
}  # fmt: skip
"""Facts that tell apart runs made in Python, and what differs where they do."""


def open_folder(run: RunFolder, options: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Make ``run`` a run folder of these ``options``, or go on with it; ``UserError`` names what differs.

    ``facts`` (data, versions, hardware) are recorded when the folder is made, and compared when it is resumed.
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


def _check(run: RunFolder, old: dict[str, Any], options: dict[str, Any], facts: dict[str, Any]) -> None:
    where = f"--run-dir {run.path}"
    for name, value in options.items():
        if name not in old and name not in RESUMABLE - {"levels"}:
            raise UserError(f"{run.path / 'config.json'} lacks the option {name}; choose another --run-dir")
        if name not in RESUMABLE and old[name] != value:
            raise UserError(
                f"{where} belongs to other options: {name} is {old[name]} there and {value} here; choose another "
                "--run-dir, or repeat the run's own options"
            )
    if type(old["levels"]) is not int:
        raise UserError(f"{run.path / 'config.json'}: levels is {old['levels']!r}, not a whole number")
    for name in ORIGINS:
        if old.get(name) != facts.get(name):
            raise UserError(f"{where} holds tickets of another {name}; choose another --run-dir")
    if old.get(PRETRAINED) != facts.get(PRETRAINED):
        there, here = (f"the weights {f[PRETRAINED]}" if PRETRAINED in f else "random values" for f in (old, facts))
        raise UserError(
            f"{where} was begun from {there}, and --pretrained gives {here}; choose another --run-dir, or the run's own weights"
        )
    if old.get("data") != facts.get("data"):
        raise UserError(
            f"{where} was trained on other data than --data-dir {options['data_dir']} holds now; choose another --run-dir, "
            "or the run's own data"
        )
    _check_own(where, old.get("own"), facts.get("own"))
    _warn_of_changes(run, old, facts)


def _check_own(where: str, old: Any, now: Any) -> None:
    """Raise ``UserError`` if the run was begun with another network, prior, likelihood or guide made in Python."""
    for name, value in (now or {}).items():
        before: Any = old.get(name) if isinstance(old, dict) else None
        tolerance = 0.0 if isinstance(value, int) else 1e-4  # a checksum is equal or not
        if type(before) not in (int, float) or not math.isclose(before, value, rel_tol=tolerance, abs_tol=tolerance):
            raise UserError(
                f"{where} was begun with another {_OWN.get(name, name)} ({name} is {before} there and {value} here); build the "
                "network after torch.manual_seed, or choose another folder"
            )


def _warn_of_changes(run: RunFolder, old: dict[str, Any], facts: dict[str, Any]) -> None:
    """Warn of what may change the last bits of what is trained now: versions, hardware, kernels, random streams."""
    for name in ("versions", "hardware", "kernels", "streams"):
        now = facts.get(name, {})
        for key, value in (now if isinstance(now, dict) else {"": now}).items():
            before = old.get(name, value) if not key else old.get(name, {}).get(key, value)
            if before != value:
                what = " ".join([name, key]).strip()
                warnings.warn(
                    f"{run.path} was begun with {what} = {before}, here it is {value}: what is trained now may differ in its "
                    "last bits",
                    stacklevel=2,
                )
    if old.get("classes") not in (None, facts.get("classes")):
        warnings.warn(f"{run.path} was begun when the classes had the names {old['classes']}", stacklevel=2)
