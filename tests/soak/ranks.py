"""Bad input that several ranks refuse together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.soak.child import RUN, Figures

TOLD = "--batch-size and --train-size must be at least 4: each device needs two images"


def ranks(root: Path, count: int, loops: int) -> Figures:
    """Bad input on two ranks, ``count`` times beside ``loops`` busy loops: each command must say so in one line and exit with 2."""
    bad = ["--devices", "2", "--device", "cpu", "--batch-size", "3", "--run-dir", str(root / "run")]
    command = [sys.executable, "-m", "pyro_lottery.imp", *RUN, *bad]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    found, otherwise = Counter[str](), []
    try:
        for _ in range(count):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            found[f"exit {done.returncode}"] += 1
            if done.returncode != 2 or done.stderr.count("\n") != 1 or TOLD not in done.stderr:
                otherwise.append(f"exit {done.returncode}: {done.stderr[-500:]}")
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {**found, "otherwise": len(otherwise), "what": otherwise[:5]}
