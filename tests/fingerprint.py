"""Bits that training ends with: ``python -m tests.fingerprint``, before and after a change that must not move them.

Nine tiny runs on digits, each through its command: three guides, two kinds of rewinding, a control, a transplant, a run that
is stopped and resumed, and one of two ranks. Of each, the checksum of all tickets, posteriors, histories and results is
printed, without the columns of time. The bits are those of one machine: compare two commits on the same one.

    python -m tests.fingerprint --save before.json          # at the commit before
    python -m tests.fingerprint --compare before.json       # after the change; exit 1 if a run differs
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ("imp", "--arch", "lenet", "--preset", "smoke")
RUNS: dict[str, tuple[str, ...]] = {
    "mean_field": SMOKE,
    "deterministic": (*SMOKE, "--guide", "deterministic"),
    "local": (*SMOKE, "--estimator", "local", "--train-samples", "2"),
    "late_rewinding": (*SMOKE, "--rewind", "epoch:1", "--epochs", "2", "--val-fraction", "0.2"),
    "lr_rewinding": (*SMOKE, "--rewind", "lr"),
    "control": ("controls", "mean_field", "--control", "reinit"),
    "transplant": ("transplant", "deterministic"),
    "resumed": (*SMOKE, "--epochs", "6"),
    "two_ranks": (*SMOKE, "--devices", "2"),
}
FOLDERS = {"control": "mean_field/controls/reinit", "transplant": "deterministic/transplant"}
NOT_BITS = {"seconds", "train_seconds", "step_ms", "predict_ms", "flops", "crc32"}
"""Columns of times, and of a checksum over them."""


def main(arguments: list[str] | None = None) -> int:
    """Train, print and compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fingerprint", description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, help="write the checksums to this file")
    parser.add_argument("--compare", type=Path, help="file of --save, whose checksums must come out again")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the code to run; default: the one of this file")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: fingerprint(name, Path(folder), given.checkout) for name in needed(given.only)}
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")
    before = json.loads(given.compare.read_text()) if given.compare else found
    for name, checksum in found.items():
        print(f"{name:16} {checksum}", "" if before.get(name) == checksum else f"DIFFERS, was {before.get(name)}")
    return int(any(before.get(name) != checksum for name, checksum in found.items()))


def needed(names: list[str]) -> list[str]:
    """The runs called ``names``, and those that their commands begin from."""
    sources = {RUNS[name][1] for name in names if name in FOLDERS}
    return [name for name in RUNS if name in sources | set(names)]


def fingerprint(name: str, where: Path, checkout: Path) -> str:
    """Train one run in ``where`` and return its checksum."""
    module, *rest = RUNS[name]
    command = [sys.executable, "-m", f"pyro_lottery.{module}", *rest]
    command += [] if name in FOLDERS else ["--run-dir", name]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    if name == "resumed":
        _stop(command, where, environment)
    subprocess.run(command, cwd=where, env=environment, check=True, stdout=subprocess.DEVNULL)
    return checksum_of(where / FOLDERS.get(name, name))


def _stop(command: list[str], where: Path, environment: dict[str, str]) -> None:
    """Begin a run and stop it by SIGTERM in level 1, which it then leaves with exit code 75."""
    process = subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (where / "resumed/level_01/ticket.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    if (code := process.wait()) not in (0, 75):
        raise SystemExit(f"the run to be resumed ended with exit code {code}")


def checksum_of(run: Path) -> str:
    """CRC-32 of a run folder's tickets, posteriors and tables, without times."""
    crc = 0
    for path in sorted([*run.glob("level_*/*.safetensors"), *run.glob("rewind/*.safetensors")]):
        crc = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(run)).encode(), crc))
    for path in sorted([*run.glob("level_*/history.csv"), run / "results.csv"]):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                kept = [f"{name}={value}" for name, value in row.items() if name not in NOT_BITS]
                crc = zlib.crc32("\n".join(kept).encode(), crc)
    return f"{crc:08x}"


if __name__ == "__main__":
    sys.exit(main())
