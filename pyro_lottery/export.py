"""Exports a found ticket as a network that runs elsewhere: ``python -m pyro_lottery.export RUN --level K -o DIR``.

Writes one file, with normalisation inside, and a model card. Every export is loaded again and compared with the run on its
test images before it is put in place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pyro_lottery.packed import DTYPES
from pyro_lottery.runs.card import reference
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.exporting import FORMATS, FORMS, TOLERANCE
from pyro_lottery.runs.loaded import load_run

PROG = "python -m pyro_lottery.export"


def parser() -> Parser:
    """The command line."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("run", help="run folder")
    parser.add_argument("--level", type=int, help="level to export; default: the last finished one")
    parser.add_argument("--form", help=f"{', '.join(FORMS)} (default: draws; mean for a state dict)")
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (default: onnx)")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="new folder for the export")
    parser.add_argument("--samples", type=int, help="draws of --form draws; default: the run's --eval-samples")
    parser.add_argument("--seed", type=int, help="seed of these draws; default: the run's --seed")
    parser.add_argument(
        "--dtype", default="fp32", help=f"values of --format safetensors: {', '.join(DTYPES)} (default: fp32)"
    )
    parser.add_argument(
        "--licence", default="unknown", help="licence of the weights, for the model card (default: unknown)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference from the run (default: %(default)g)"
    )
    parser.add_argument("--data-dir", help="folder with the run's data; default: the run's own --data-dir")
    parser.add_trust_option()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)

    def work() -> None:
        run = load_run(given.run, given.trust_code)
        level = run.folder.finished()[-1].level if given.level is None else given.level
        options = {
            name: getattr(given, name) for name in ("samples", "seed", "dtype", "tolerance", "licence", "data_dir")
        }
        facts = run.level(level).export(given.out, given.form, given.format, **options).facts
        print(
            f"{given.out / facts['file']}: {facts['bytes']:,} bytes; over {facts['compared_images']:,} test images the largest "
            f"differences from {reference(facts['form'])} are "
            + ", ".join(f"{name} {value:.1g}" for name, value in facts["largest_difference"].items())
        )
        if facts["dtype"] != "fp32":
            before, after = facts["measured_in_fp32"], facts["measured"]
            print(
                f"accuracy {before['accuracy']:.4f} of the run in fp32, {after['accuracy']:.4f} in the file; NLL {before['nll']:.4f} and "
                f"{after['nll']:.4f}"
            )

    return run_command(PROG, work, arguments, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
