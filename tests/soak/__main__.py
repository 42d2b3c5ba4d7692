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
from collections.abc import Sequence
from pathlib import Path

PARTS = ("kills", "stops", "faults", "damaged_files", "random_commands", "together", "ranks")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (default: 50)")
    parser.add_argument("--stops", type=int, default=20, help="SIGTERMs (default: 20)")
    parser.add_argument("--every", type=int, default=1, help="faults at every so many writing calls (default: 1)")
    parser.add_argument("--mutations", type=int, default=2000, help="changed files (default: 2000)")
    parser.add_argument("--commands", type=int, default=500, help="random command lines (default: 500)")
    parser.add_argument("--ranks", type=int, default=50, help="bad input on two ranks (default: 50)")
    parser.add_argument("--loops", type=int, default=2, help="busy loops beside these (default: 2)")
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
    from tests.soak.parts import soak  # not before the second start: it takes seconds to import

    soak(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
