"""The first day on a GPU: is all that holds on the CPU true there too, and what does a step cost?

Each section takes less than ten minutes and is written to ``OUT`` when it is done; a later call goes on with those that are
missing. A line per check says PASS, FAIL or INFO. ``--dry`` runs all sections on the CPU, with narrow networks and a tape in a
CUDA graph's place, to prove the programme itself. Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pyro
import torch

from experiments.benchmarks.gpu import bits, commands, costs
from experiments.benchmarks.gpu.day import ARCHS, PRECISIONS, Check, Checks, Day, held, said
from experiments.benchmarks.launches import NARROW
from pyro_lottery import files

SECTIONS: dict[str, Callable[[Day], Checks]] = {
    "machine": costs.the_machine, "correct": bits.correct, "waits": costs.waits, "speed": costs.speed, "graphs": bits.graphs,
    "resume": commands.resume, "imp": commands.whole_imp, "shares": commands.shares, "predictions": costs.predictions,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.gpu", description=__doc__)
    every = f"default: all that are missing of {' '.join(SECTIONS)}"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=every)
    parser.add_argument("--dry", action="store_true", help="on the CPU, to prove the programme itself")
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHS, help="networks of the sections that take several; default: all"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="precisions, likewise")
    parser.add_argument("--data-dir", help="folder of CIFAR-10 as images, for whole commands; default: digits")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print and write their checks."""
    given = parser().parse_args(arguments)
    if unknown := [name for name in given.sections if name not in SECTIONS]:
        parser().error(f"unknown section {unknown[0]!r}; known: {' '.join(SECTIONS)}")
    if not given.dry and not torch.cuda.is_available():
        parser().error("this machine has no GPU; --dry runs the programme on the CPU")
    if given.dry and (wide := [arch for arch in given.arch or () if arch not in NARROW]):
        parser().error(f"--dry has no narrow {wide[0]}; it has {' '.join(NARROW)}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts, for --deterministic
    day = Day(given.dry, given.out, given.data_dir, given.arch, given.precision)
    given.out.mkdir(parents=True, exist_ok=True)
    with pyro.validation_enabled(False):
        for name in given.sections or [n for n in SECTIONS if not (given.out / f"{n}.json").exists()]:
            _run(day, name)
    return _report(day)


def _run(day: Day, name: str) -> None:
    """Run one section, and write what it found; an error is a check that failed."""
    checks, began = list[Check](), time.perf_counter()
    print(f"\n{name}", flush=True)
    try:
        for check in SECTIONS[name](day):
            checks.append(check)
            print(check, flush=True)
    except Exception as error:
        traceback.print_exc()
        checks.append(held(name, False, said(error)))
        print(checks[-1], flush=True)
    found = {"seconds": round(time.perf_counter() - began), "checks": [asdict(check) for check in checks]}
    files.write_atomic(day.out / f"{name}.json", json.dumps(found, indent=1).encode())


def _report(day: Day) -> int:
    """Write all sections so far as one page; returns the exit code."""
    lines, failed = list[str](), 0
    for name in SECTIONS:
        path = day.out / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            failed += sum(check["kind"] == "FAIL" for check in found["checks"])
            lines += [f"## {name}, {found['seconds']} s", "", *(f"- {Check(**check)}" for check in found["checks"]), ""]
    if (day.out / "speed.md").exists():
        lines += [(day.out / "speed.md").read_text(), ""]
    files.write_atomic(day.out / "report.md", "\n".join(lines).encode())
    print(f"\n{failed} checks failed; {day.out / 'report.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
