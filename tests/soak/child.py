"""The run that is disturbed, in forked processes, each with a fault armed."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pyro_lottery import imp
from pyro_lottery.runs import checkpoint

RUN = [
    "--arch", "lenet", "--preset", "quick", "--levels", "3", "--epochs", "6", "--milestones", "4", "--train-size", "300",
    "--eval-samples", "2",
]  # fmt: skip
KINDS = ("count", "no space", "I/O error", "short write", "lost write", "full disk", "kill")
"""In the order of faults.c. A short write says so and is to be repeated; of a lost one half is missing that was reported written."""
SAVE_SECONDS = 0.2
"""Between checkpoints here, so that kills and faults meet them; ordinarily 5."""
LATE = ("matplotlib.backends.backend_agg", "sklearn.datasets", "torchmetrics.functional.classification")
Figures = dict[str, Any]


class Child:
    """A run in a forked process, with a fault armed."""

    def __init__(self, folder: Path, main: Callable[[list[str]], int], arguments: Sequence[str], at: int, kind: str):
        self.log = folder.with_name(f"{folder.name}.log")
        self.began, self.code = time.monotonic(), None
        self.pid = os.fork()
        if self.pid == 0:
            self._be_the_run(folder, main, list(arguments), at, kind)

    def _be_the_run(
        self, folder: Path, main: Callable[[list[str]], int], arguments: list[str], at: int, kind: str
    ) -> None:
        code = 1
        try:
            with open(self.log, "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115 (as Python's own)
            checkpoint.CHECKPOINT_SECONDS = SAVE_SECONDS
            _shim().soak_arm(os.fsencode(folder), at, KINDS.index(kind))
            try:
                code = main(arguments)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            if kind == "count":
                counts = {name: _shim().soak_calls(number) for number, name in enumerate(KINDS)}
                folder.with_name(f"{folder.name}.calls").write_text(json.dumps(counts))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 60.0) -> int | None:
        """The exit code (negative: the signal that ended it), or None if it still works after ``seconds``."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > end:
                return None
            time.sleep(0.002)
        return self.code

    def complaints(self) -> list[str]:
        """What it said of errors and warnings; the lines of a traceback too."""
        lines = self.log.read_text(errors="replace").splitlines()
        if any(line.startswith("Traceback") for line in lines):
            return lines
        return [line for line in lines if line.startswith("python -m") and "warning:" not in line]


def import_all() -> None:
    """Import what a run imports only when it needs it, which takes every child as long as its training."""
    for name in LATE:
        importlib.import_module(name)


def _shim() -> Any:
    library = ctypes.CDLL(None)
    if not hasattr(library, "soak_arm"):
        raise SystemExit("tests.soak must be started by python -m tests.soak, which preloads faults.c")
    library.soak_calls.restype, library.soak_calls.argtypes = ctypes.c_long, [ctypes.c_int]
    library.soak_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    return library


def start(folder: Path, at: int = 0, kind: str = "count") -> Child:
    """The run in ``folder``, or what is left of it."""
    return Child(folder, imp.main, [*RUN, "--run-dir", str(folder)], at, kind)


def undisturbed(root: Path) -> tuple[Path, dict[str, int], float]:
    """The run to compare with, the number of calls that each kind of fault can hit, and its seconds; trained once a process."""
    whole, calls, seconds = _trained()
    return Path(shutil.copytree(whole, root / "whole")), dict(calls), seconds


@cache
def _trained() -> tuple[Path, dict[str, int], float]:
    root = Path(tempfile.mkdtemp(prefix="soak-whole-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    child = start(root / "whole")
    assert child.wait(600) == 0, child.log.read_text()
    seconds = time.monotonic() - child.began
    return root / "whole", json.loads((root / "whole.calls").read_text()), seconds
