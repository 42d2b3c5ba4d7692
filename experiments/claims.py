"""Question: which of the paper's 14 claims hold here? ``python -m experiments.claims RUNS``.

Each claim is a list of statistics, one number per seed, with a 95 % interval over seeds (Student's t) and a verdict: holds
where the whole interval is on the claimed side, fails where it is on the other, not enough evidence otherwise, and with
fewer than three seeds always. A claim holds if all its parts do and fails if one does. Complete runs alone count. Prints
the table and writes ``claims.md`` and ``claims.json``. Accuracies are in percent, at the end of training unless
``--accuracy`` says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.study.finished import ACCURACIES
from experiments.study.verdicts.written import write
from pyro_lottery.runs.cli import Parser, run_command


def parser() -> Parser:
    """The command line."""
    parser = Parser("python -m experiments.claims", str(__doc__))
    parser.add_argument("runs", type=Path, help="folder of runs")
    parser.add_argument("-o", "--output", type=Path, help="folder for claims.md and claims.json; default: RUNS/figures")
    parser.add_argument("--protocol", help="judge the runs of one protocol alone")
    parser.add_argument("--data", help="which runs, where the folder holds those of several data sets")
    parser.add_argument("--accuracy", default="test_accuracy", help=f"{' or '.join(ACCURACIES)} (the paper's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)
    folder = given.output or given.runs / "figures"

    def work() -> None:
        print(write(given.runs, folder, given.protocol, given.data, given.accuracy))

    return run_command("python -m experiments.claims", work, arguments)


if __name__ == "__main__":
    sys.exit(main())
