"""Question: is anything finished ever lost, and can a file that somebody sends do harm?

Runs of the quick preset on digits are killed, stopped, starved of disk and fed damaged files; every figure is counted, none
assumed. Linux, with a C compiler: faults come from a library that is preloaded (faults.c). The runs are children of one
process that has imported everything, so that a second of soak is a second of training.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyro_lottery import files
from tests.soak.child import Figures
from tests.soak.commands import random_commands
from tests.soak.damaged import damaged_files
from tests.soak.ranks import ranks
from tests.soak.signals import kills, stops
from tests.soak.together import together
from tests.soak.writes import faults

PARTS = {part.__name__: part for part in (kills, stops, faults, damaged_files, random_commands, together, ranks)}


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as folder:
        try:
            yield Path(folder)
        finally:
            os.chdir(here)


def soak(given: argparse.Namespace) -> Figures:
    """The parts that are asked for, each printed as it ends."""
    amounts = {
        "kills": (given.kills,), "stops": (given.stops,), "faults": (given.every,), "damaged_files": (given.mutations,),
        "random_commands": (given.commands,), "together": (), "ranks": (given.ranks,),
    }  # fmt: skip
    figures: Figures = {}
    for name in given.only:
        part = PARTS[name]
        began = time.monotonic()
        with _scratch(name) as root:
            figures[name] = part(root, *amounts[name])
        figures[name]["seconds"] = round(time.monotonic() - began)
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in figures[name].items())}", flush=True)
    return figures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (default: 50)")
    parser.add_argument("--stops", type=int, default=20, help="SIGTERMs (default: 20)")
    parser.add_argument("--every", type=int, default=1, help="faults at every so many writing calls (default: 1)")
    parser.add_argument("--mutations", type=int, default=2000, help="changed files (default: 2000)")
    parser.add_argument("--commands", type=int, default=500, help="random command lines (default: 500)")
    parser.add_argument("--ranks", type=int, default=50, help="bad input on two ranks (default: 50)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("-o", "--output", type=Path, help="file for the figures as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Start again with faults.c preloaded, soak, print and write."""
    given = parser().parse_args(arguments)
    if sys.platform != "linux":
        print("python -m tests.soak: needs Linux, whose file system calls it lets fail", file=sys.stderr)
        return 2
    if not hasattr(ctypes.CDLL(None), "soak_arm"):
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            library = Path(folder, "faults.so")
            source = Path(__file__).with_name("faults.c")
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
            again = [sys.executable, "-m", "tests.soak", *(sys.argv[1:] if arguments is None else arguments)]
            preload = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}  # a forked OpenMP has no threads
            return subprocess.run(again, env=os.environ | preload).returncode
    figures = soak(given)
    if given.output:
        files.write_json(given.output, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
