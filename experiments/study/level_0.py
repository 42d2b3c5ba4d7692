"""Level 0 of a study's runs: where a run finds it trained, so that it is trained once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pyro_lottery.errors import Damaged
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.sharing import gives_level_0
from pyro_lottery.tables import list_runs


def source_of(config: Config, root: Path) -> RunFolder | None:
    """A run in ``root`` that has finished the level 0 that a run of ``config`` needs, or None."""
    for run in list_runs(root) if root.is_dir() else []:
        precision = run.config.precision if config.precision == "auto" else config.precision  # a saved one is concrete
        try:
            if gives_level_0(run.config, replace(config, precision=precision)) and run.folder.level(0).manifest():
                return run.folder
        except Damaged:  # that run trains it again
            continue
    return None
