"""Question: which of the paper's results hold? Every figure, the table, and a verdict on every claim, from one command.

Runs that several figures need are trained once, and finished runs are not trained again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.command import FIGURES, parser, work
from experiments.study.verdicts.written import write
from pyro_lottery.runs.cli import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m experiments.all``: returns the exit code."""
    given = parser("all", str(__doc__)).parse_args(arguments)

    def judge(folder: Path, data: str) -> None:
        write([given.runs], folder, given.protocol, data)

    return run_command("python -m experiments.all", lambda: work(FIGURES, given, judge), arguments)


if __name__ == "__main__":
    sys.exit(main())
