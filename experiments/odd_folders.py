"""Question: what comes of folders of images as people have them? ``python -m experiments.odd_folders -o plots/gallery/folders.md``

Each case builds a folder and states what ``--dataset folder`` reads from it: the pixels by class and the messages, or the
one line that refuses it.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import pyro_lottery as pl
from experiments.study.markdown import markdown_table
from experiments.trials.folder_cases import CASES, USUAL, Case, Outcome
from experiments.trials.table import counted, run


def try_out(case: Case) -> Outcome:
    """Build the folder in a temporary folder, read it, and return what came of it."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(record=True) as said:
        root = Path(place) / "DIR"
        root.mkdir()
        case.build(root)
        warnings.simplefilter("always")
        said.clear()
        try:
            data = pl.data.load("folder", root, image_size=case.image_size)
        except pl.UserError as error:
            return Outcome(error=str(error).replace(str(root), "DIR"))
        assert data.classes is not None
        assert data.num_classes == len(data.classes)
        says = tuple(str(each.message).replace(str(root), "DIR").removeprefix("--data-dir DIR: ") for each in said)
        return Outcome(_text(data.train, data.classes), _text(data.test, data.classes), says)


def _text(split: Any, classes: Sequence[str]) -> str:
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for pixels, label in zip(split.pixels, split.labels.tolist(), strict=True):
        by_class[classes[label]].append(_values(pixels))
    return ", ".join(" ".join([name, *values]) for name, values in by_class.items())


def _values(pixels: Tensor) -> str:
    """One value, the three of a colour, or the rows separated by a slash."""
    if bool((pixels == pixels[0, 0, 0]).all()):
        return str(int(pixels[0, 0, 0]))
    if bool((pixels == pixels[:, :1, :1]).all()):
        return f"({','.join(str(int(c)) for c in pixels[:, 0, 0])})"
    assert bool((pixels == pixels[:1]).all()), "only grey images are shown by rows"
    return f"[{'/'.join(','.join(map(str, row)) for row in pixels[0].tolist())}]"


HEAD = """# Folders of images, one line each

Each folder holds two classes of 2×2 images, `train/cat`, `train/dog`, `test/cat` and `test/dog`, with one thing unusual.

- **read** shows the images: one of a single grey by its value, one of a single colour as (red,green,blue), others as [first row/second
  row]. "All" is what was saved: cat 10 20, dog 30 40 for training; cat 50, dog 60 for the test.
- **said** is a line on stderr, which begins with --data-dir DIR, or a warning in Python.
- "Refused" is an error in one line, before anything is trained.

"""


def markdown(cases: Sequence[Case]) -> str:
    """The table of the cases and what is expected of each."""
    count = counted("folders", len(cases), sum(bool(case.expected.error) for case in cases))
    lines = f"{HEAD}{count}; checked and written by `python -m experiments.odd_folders -o plots/gallery/folders.md`.\n"
    table = markdown_table(("folder", "read", "said"), ((case.name, *_cells(case.expected)) for case in cases))
    return "\n".join([lines, *table]) + "\n"


def _cells(expected: Outcome) -> tuple[str, str]:
    if expected.error:
        return "refused", expected.error
    usual = (expected.train, expected.test) == (USUAL.train, USUAL.test)
    return "all" if usual else f"{expected.train}; test: {expected.test}", "; ".join(expected.says)


def fault(case: Case) -> str:
    """What is wrong with the outcome of a case, or empty."""
    found = try_out(case)
    return "" if found == case.expected else f"{found}, expected {case.expected}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if an outcome is not the expected one."""
    trials = ((case.name, fault(case)) for case in CASES)
    return run("folders", str(__doc__), trials, markdown(CASES), arguments)


if __name__ == "__main__":
    sys.exit(main())
