"""Predicts image files with a run or an export: ``python -m pyro_lottery.predict FOLDER IMAGES...``.

FOLDER is a run or what ``python -m pyro_lottery.export`` wrote. For each image it prints the most probable class, its
probability, and the entropies of the prediction in nats. An ONNX file is predicted without torch.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyro_lottery.exports.predictor import Predictor

PROG = "python -m pyro_lottery.predict"
BATCH = 64
"""Images that are predicted together."""
COLUMNS = ("image", "class", "probability", "total", "aleatoric", "epistemic")
"""Columns of a prediction; entropies that the network does not have are left out."""


def rows(predictor: Any, images: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
    """Yield a dictionary of ``COLUMNS`` for each image file. Raises ``ValueError`` or ``OSError`` for a file that does not fit."""
    for start in range(0, len(images), BATCH):
        paths = images[start : start + BATCH]
        outputs = predictor(predictor.read(paths))
        probs = outputs.pop("probs")
        for i, path in enumerate(paths):
            best = int(probs[i].argmax())
            row = {"image": str(path), "class": predictor.classes[best], "probability": float(probs[i, best])}
            yield row | {name: float(value[i]) for name, value in outputs.items()}


def show(found: Sequence[dict[str, Any]], as_csv: bool) -> None:
    """Print predictions as a table, or as CSV."""
    names = [name for name in COLUMNS if name in found[0]]
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([row[name] for name in names] for row in found)
        return
    cells = [[f"{row[name]:.4f}" if isinstance(row[name], float) else row[name] for name in names] for row in found]
    widths = [max(len(line[i]) for line in (names, *cells)) for i in range(len(names))]
    for line in (names, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(PROG, description=str(__doc__), allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="an export, or a run")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files")
    parser.add_argument("--csv", action="store_true", help="print CSV with all digits")
    parser.add_argument("--level", type=int, help="level of a run; default: the last finished one")
    parser.add_argument("--samples", type=int, help="posterior samples of a run or a ticket; default: its own")
    parser.add_argument(
        "--backend", default="auto", help="of a run or a ticket: auto, sparse or dense layers (default: auto)"
    )
    parser.add_argument("--data-dir", help="folder with a run's data; default: the run's own --data-dir")
    parser.add_argument(
        "--trust-code", action="store_true", help="import code that a run or a ticket names by import path"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)

    options = {name: getattr(given, name) for name in ("level", "samples", "backend", "data_dir", "trust_code")}
    if not (given.folder / "model.onnx").is_file():
        return _with_torch(given, options, arguments)
    try:
        if odd := [name for name, value in options.items() if value not in (None, False, "auto")]:
            raise ValueError(
                f"{given.folder} is an exported graph, which has all of this in it; omit --{odd[0].replace('_', '-')}"
            )
        show(list(rows(Predictor(given.folder), given.images)), given.csv)
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _with_torch(given: argparse.Namespace, options: dict[str, Any], arguments: Sequence[str] | None) -> int:
    from pyro_lottery.errors import UserError
    from pyro_lottery.runs.cli import run_command
    from pyro_lottery.runs.predicting import open_folder

    def work() -> None:
        network = open_folder(given.folder, **options)
        try:
            found = list(rows(network, given.images))
        except ValueError as error:
            raise UserError(str(error)) from error
        show(found, given.csv)

    return run_command(PROG, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
