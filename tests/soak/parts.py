"""The parts of the soak, in the order in which they run."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_lottery import files
from tests.soak import child
from tests.soak.child import Figures
from tests.soak.commands import random_commands
from tests.soak.damaged import damaged_files
from tests.soak.ranks import ranks
from tests.soak.signals import kills, stops
from tests.soak.together import together
from tests.soak.writes import faults


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as folder:
        try:
            yield Path(folder)
        finally:
            os.chdir(here)


def soak(given: argparse.Namespace) -> None:
    """The parts that are asked for, each printed as it ends; all of their figures are written at the end."""
    child.import_all()
    amounts = {
        kills: (given.kills,), stops: (given.stops,), faults: (given.every,), damaged_files: (given.mutations,),
        random_commands: (given.commands,), together: (), ranks: (given.ranks, given.loops),
    }  # fmt: skip
    figures: Figures = {}
    for part, amount in amounts.items():
        if (name := part.__name__) in given.only:
            began = time.monotonic()
            with _scratch(name) as root:
                figures[name] = part(root, *amount)
            figures[name]["seconds"] = round(time.monotonic() - began)
            print(f"{name}: {', '.join(f'{k} {v}' for k, v in figures[name].items())}", flush=True)
    if given.output:
        files.write_json(given.output, figures)
