"""Question: does a Bayesian network, dense and pruned, keep the accuracy of the deterministic one, and how calibrated is each?

Takes the options of ``python -m pyro_lottery.imp``, trains with both guides unless finished, and prints the levels of both
runs as one Markdown table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.study.markdown import markdown_table
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.cli import parse, run_command
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.loaded import Run

PROG = "python -m experiments.bayesian_vs_deterministic"
GUIDES = ("deterministic", "mean_field")


def configs(arguments: Sequence[str]) -> list[Config]:
    """The two runs that the question needs."""
    return [parse(PROG, str(__doc__), [*arguments, "--guide", guide]) for guide in GUIDES]


def markdown(runs: Sequence[Run]) -> str:
    """All levels of ``runs`` as a Markdown table."""
    columns = ("network", "data", "guide", "density", "accuracy", "NLL", "MACE", "seed", "training")
    rows = list[Sequence[object]]()
    for run in runs:
        c = run.config
        for row in run.folder.results():
            shares = (f"{100 * row.density:.1f} %", f"{100 * row.test_accuracy:.2f} %")
            minutes = f"{row.train_seconds / 60:.1f} min"
            rows.append((c.arch, c.dataset, c.guide, *shares, f"{row.nll:.3f}", f"{row.mace:.3f}", c.seed, minutes))
    return "\n".join(markdown_table(columns, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(PROG, lambda: print(markdown([run_imp(config) for config in configs(given)])), arguments)


if __name__ == "__main__":
    sys.exit(main())
