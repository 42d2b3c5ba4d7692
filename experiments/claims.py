"""Question: which of the paper's 14 claims hold here? ``python -m experiments.claims RUNS``.

Each claim is a list of statistics with one number per seed, paired by seed. A statistic by itself holds or fails if
Student's t test of its mean over seeds says so at 2.5 %, corrected by Holm over the statistics of the claim and the network; a difference is
equivalent to 0 if two one-sided tests put its mean within a margin. Fewer seeds than the protocol's, or than three, cannot tell. A claim holds for a network if the tests of all
its statistics say so, which needs no correction, and fails if one fails; it has a verdict for all networks where each has one. Only complete runs, controls and transplants count. Prints the table and writes ``claims.md``, ``claims.json`` and the evidence, from
which ``python -m experiments.claims FOLDER`` judges again without the runs. Accuracies are in percent, at the end of training unless
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
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="folders of runs, or of the evidence that this command has written; a run that several have counts once",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder for what is written; default: figures in the first folder"
    )
    parser.add_argument("--protocol", help="judge only the runs of this protocol")
    parser.add_argument("--data", help="which runs, if the folder holds several data sets")
    parser.add_argument("--accuracy", default="test_accuracy", help=f"{' or '.join(ACCURACIES)} (the paper's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)
    folder = given.output or given.runs[0] / "figures"

    def work() -> None:
        print(write(given.runs, folder, given.protocol, given.data, given.accuracy))

    return run_command("python -m experiments.claims", work, arguments, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
