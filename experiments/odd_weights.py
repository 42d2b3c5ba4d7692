"""Question: what comes of weight files as people have them? ``python -m experiments.odd_weights -o plots/gallery/weights.md``

Each case writes a file, reads it into a small network as ``python -m pyro_lottery.transplant FILE`` does, and states the
density and every value of the ticket, or the one line that refuses it.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import pyro_lottery as pl
from experiments.study.markdown import markdown_table
from experiments.trials.table import counted, run
from experiments.trials.weight_cases import ZEROS, Case, cases
from experiments.trials.weights import into
from pyro_lottery import masks, transplant
from pyro_lottery.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What came of a file."""

    ticket: pl.Ticket | None
    said: str
    """The error's line, or all messages, with FILE for the path."""


def try_out(case: Case) -> Outcome:
    """Write the case's file, read it as the source of a transplant, and return what came of it."""
    printed, ticket, error = io.StringIO(), None, ""
    with tempfile.TemporaryDirectory() as made:
        path, masked = Path(made) / case.file.rstrip(","), Path(made) / f"{case.file.rstrip(',')}.mask"
        case.write(path)
        if case.mask:
            case.mask(masked)
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            try:
                ticket = transplant.ticket_of(*transplant.read(path, masked if case.mask else None, case.key), into())
            except UserError as wrong:
                error = str(wrong)
        lines = [str(each.message) for each in caught] + printed.getvalue().splitlines()
        return Outcome(ticket, (error or "; ".join(lines)).replace(str(path), "FILE"))


def agrees(case: Case, outcome: Outcome) -> str:
    """What is wrong with an outcome, or empty."""
    before, cut_short, _ = case.line.partition("…")
    if not (outcome.said.startswith(before) if cut_short else outcome.said == case.line) or "\n" in outcome.said:
        return f"it says {outcome.said!r}, not {case.line!r}"
    if (case.right is None) != (outcome.ticket is None):
        return "it is refused" if case.right else "it is read"
    if outcome.ticket is None or case.right is None:
        return ""
    found = {**outcome.ticket.start.loc, **outcome.ticket.net}
    wrong = [name for name, value in case.right.items() if not torch.equal(found[name], value)]
    if wrong or found.keys() != case.right.keys():
        return f"{wrong[:1] or 'a name'} is wrong"
    density = masks.density(outcome.ticket.mask)
    return "" if density == case.density else f"density is {density}, not {case.density}"


HEAD = """# Weight files, one line each

What `python -m pyro_lottery.transplant FILE` makes of weight files as people have them. The network has one convolution, BatchNorm,
a linear layer and a classifier, with 132 prunable weights.

- "Read": every value of the ticket is right, and its density is the given one. Messages follow; "zeros" stands for the message
  that says how many zeros count as pruned.
- Otherwise the command ends with exit code 2 and the given line. FILE is the path; … is the rest of a line of another library.

Each row is a test.

"""


def markdown(every: Sequence[Case]) -> str:
    """The table of the cases and what must come of each."""
    count = counted("files", len(every), sum(case.right is None for case in every))
    lines = f"{HEAD}{count}. Made by `python -m experiments.odd_weights -o plots/gallery/weights.md`.\n"
    table = markdown_table(("file", "", "what comes of it"), map(_cells, every))
    return "\n".join([lines, *table]) + "\n"


def _cells(case: Case) -> tuple[str, str, str]:
    density = f"read, density {100 * case.density:.4g} %" if case.right is not None else ""
    line = case.line.replace(ZEROS, "zeros")
    told = ". ".join(part for part in (density, line) if part).replace("|", "/")
    return case.file.rstrip(","), case.what, told


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if an outcome is not the stated one."""
    every = cases()
    trials = ((case.name, agrees(case, try_out(case))) for case in every)
    return run("weights", str(__doc__), trials, markdown(every), arguments)


if __name__ == "__main__":
    sys.exit(main())
