"""Predicts image files with a run or an export: ``python -m pyro_lottery.predict FOLDER IMAGES...``.

FOLDER is a run or what ``python -m pyro_lottery.export`` wrote. For each image it prints the most probable class, its
probability, and the entropies of the prediction in nats. An ONNX file is predicted without torch.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_lottery.errors import OneLineParser, UserError, one_line
from pyro_lottery.exports.predictor import Predictor

PROG = "python -m pyro_lottery.predict"
BATCH = 64
"""Images that are predicted together."""
COLUMNS = ("image", "class", "probability", "total", "aleatoric", "epistemic")
"""Columns of a prediction; entropies that the network does not have are left out."""


def rows(predictor: Any, images: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
    """Yield a dictionary of ``COLUMNS`` for each image file.

    Raises ``ValueError`` for a file that does not fit; a file that is missing is named before anything is predicted.
    """
    if missing := [path for path in images if not Path(path).is_file()]:
        raise ValueError(f"{missing[0]} is not a file" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
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
    cells = [[cell if cell.isprintable() else ascii(cell) for cell in line] for line in cells]  # names of files
    widths = [max(len(line[i]) for line in (names, *cells)) for i in range(len(names))]
    for line in (names, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(PROG, description=str(__doc__), allow_abbrev=False)
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

    def work() -> None:
        found: list[dict[str, Any]] = []
        try:
            found.extend(rows(_opened(given.folder, options), given.images))
        except (ValueError, FileNotFoundError) as error:
            raise UserError(" ".join(str(error).split())) from error
        except ImportError as error:
            raise UserError(f"{error}; onnxruntime and Pillow come with pip install 'pyro-lottery[export]'") from error
        finally:
            if found:  # what was predicted before an error, too
                with _a_reader_that_may_leave():
                    show(found, given.csv)

    if (given.folder / "model.onnx").is_file():
        return _without_torch(work)
    from pyro_lottery.runs.cli import run_command

    return run_command(PROG, work, arguments, resumes=False)


def _opened(folder: Path, options: dict[str, Any]) -> Any:
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give its folder, {folder.parent}")
    if (folder / "model.pt").is_file():
        raise ValueError(f"{folder} holds weights alone; load model.pt into a network, as its README.md says")
    if not (folder / "model.onnx").is_file():
        from pyro_lottery.runs.predicting import open_folder

        return open_folder(folder, **options)
    if odd := [name for name, value in options.items() if not (value is None or value is False or value == "auto")]:
        raise ValueError(
            f"{folder} is an exported graph, which has all of this in it; omit --{odd[0].replace('_', '-')}"
        )
    return Predictor(folder)


def _without_torch(work: Callable[[], None]) -> int:
    """What ``run_command`` does, which imports torch."""
    code, said = 0, ""
    try:
        work()
    except UserError as error:
        code, said = 2, str(error)
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith("onnxruntime")):
            raise  # a bug, so that its traceback is shown
        code, said = 1, one_line(error)
    if said:
        print(f"{PROG}: {said}", file=sys.stderr)
    return code


@contextmanager
def _a_reader_that_may_leave() -> Iterator[None]:
    """Ignore that the reader of our output has closed its pipe, as ``head`` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end


if __name__ == "__main__":
    sys.exit(main())
