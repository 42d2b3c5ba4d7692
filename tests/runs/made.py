"""Run folders that no training made."""

import pyro_lottery as pl
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.resume import open_folder
from pyro_lottery.types import LevelResult, ticket_checksum
from tests.support import ticket

OPTIONS = {"arch": "lenet", "levels": 2, "milestones": (3, 4), "seed": 0, "run_dir": "x", "epochs": 5}


def row(level):
    """The row of a level of :func:`ticket`."""
    return LevelResult(
        level=level, density=0.6, remaining=6, total=10, test_accuracy=0.5, max_test_accuracy=0.6,
        nll=1.25, mace=0.1, ece=0.2, brier=0.3, train_seconds=12.5, step_ms=3.25,
    )  # fmt: skip


def finish(run, level, epochs=OPTIONS["epochs"], rewind=False):
    """Make a level finished; returns its ticket."""
    folder, saved = run.level(level), ticket()
    folder.save_ticket(saved)
    folder.save_posterior(pl.masks.apply(saved.mask, saved.start), saved.net)
    folder.save_history([{"epoch": 1.0, "loss": 2.0}] * epochs)
    folder.finish(row(level), ticket_checksum(saved), rewind)
    return saved


def opened(path, options=None, facts=None):
    """A run folder that was made, or resumed, with ``options``."""
    run = RunFolder(path)
    open_folder(run, options or OPTIONS, facts or {})
    return run


def truncate(path):
    """Take the last two bytes of a file away."""
    path.write_bytes(path.read_bytes()[:-2])


def replace_text(path, old, new):
    """Change a text file once."""
    path.write_text(path.read_text().replace(old, new, 1))
