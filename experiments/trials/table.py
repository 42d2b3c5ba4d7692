"""What the two experiments ``odd_*`` share: the command line, and the sentence that counts the cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pyro_lottery.files import write_atomic
from pyro_lottery.runs.cli import Parser


def run(
    what: str, description: str, trials: Iterable[tuple[str, str]], table: str, arguments: Sequence[str] | None
) -> int:
    """The command line of ``experiments.odd_WHAT``: print what is wrong with each case, and write ``table``.

    ``trials`` are the cases' names, each with what is wrong with its outcome, empty if nothing. A generator tries the cases
    out only after the command line has been read. Returns the exit code, 1 if a case is wrong.
    """
    parser = Parser(f"python -m experiments.odd_{what}", description)
    parser.add_argument("-o", "--output", type=Path, default=Path(f"figures/{what}.md"), help="file for the table")
    output = parser.parse_args(arguments).output
    faults = dict(trials)
    wrong = {name: fault for name, fault in faults.items() if fault}
    for name, fault in wrong.items():
        print(f"{name}: {fault}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, table.encode())
    print(f"{len(faults) - len(wrong)} of {len(faults)} cases as stated: {output}")
    return int(bool(wrong))


def counted(what: str, total: int, refused: int) -> str:
    """The sentence that counts the cases.

    >>> counted("files", 30, 10)
    '30 files: 20 are read, 10 are refused in one line'
    """
    return f"{total} {what}: {total - refused} are read, {refused} are refused in one line"
