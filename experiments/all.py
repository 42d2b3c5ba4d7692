"""Question: what of the paper holds? Every figure, the table, and a verdict on every claim, from one command.

Runs that figures share are trained once; a finished run is never run again.
"""

import sys
from collections.abc import Sequence

from experiments import claims
from experiments.command import FIGURES, parser, work
from pyro_lottery.commands import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m experiments.all``: returns the exit code."""
    given = parser("all", str(__doc__)).parse_args(arguments)

    def everything() -> None:
        work(FIGURES, given)
        if not given.dry_run:
            claims.write(given.runs, given.figures or given.runs / "figures", given.protocol)

    return run_command("python -m experiments.all", everything)


if __name__ == "__main__":
    sys.exit(main())
