"""What a worker of a cluster does with one run: train what can be trained of it now, and write its output to a log."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from experiments.study.jobs import Job, ready, unfinished
from pyro_lottery import machine
from pyro_lottery.errors import Busy, Stopped, one_line

WAIT_SECONDS = 5.0
"""Time between two attempts at a run on which another process is working."""


def log_of(job: Job, root: Path) -> Path:
    """The file to which a worker writes the output of ``job``."""
    return root / "logs" / f"{'-'.join(job.folder(root).path.relative_to(root).parts)}.log"


@contextmanager
def logging(job: Job, root: Path) -> Iterator[TextIO]:
    """The log of ``job``, open for appending."""
    log = log_of(job, root)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        yield file


def train(job: Job, root: Path, failure: str | None = None, here: Path | None = None) -> str | None:
    """Train what is not finished of ``job`` and has its tickets; returns why it failed, or None.

    ``failure`` is that of the run whose tickets ``job`` uses. ``here`` is the folder in which the study was started;
    relative paths are relative to it.
    """
    if failure:
        return "the run that it is made from failed"
    if here:
        os.chdir(here)
    if not (part := ready(job, root)):
        return None
    with logging(job, root) as file, redirect_stdout(file), redirect_stderr(file):
        machine.keep_memory()  # as in the commands
        print(f"begin {job}, levels {unfinished(part, root)}, pid {os.getpid()}", flush=True)
        try:
            while part:
                try:
                    part.run(root)
                except Busy as error:  # another study shares the folder, or an old worker is about to die
                    print(error)
                    time.sleep(WAIT_SECONDS)
                part = ready(job, root)  # more tickets may exist by now
        except Stopped:
            print("stopped, everything is saved")
            raise
        except Exception as error:
            traceback.print_exc()
            return f"{one_line(error)}; see {file.name}"
        print(f"end {job}")
    return None
