"""Question: which way to a sparse Bayesian network gives most for its training?

Every method has the same number of epochs in all. Iterative pruning divides them among its trainings, one-shot pruning between two, and
schedules spend them on one. ``dense`` is the network without pruning, whose training the scores of the initial weights do not need.
With ``--equal-seconds TABLE`` every method trains as long as the first one did in an earlier table of equal epochs.
Methods are compared with the first by pairs of seeds. Beside the test images they see corrupted ones (each kind at severity 3, and the mean
over kinds) and images with permuted pixels, which the entropy is to detect. Writes ``OUT/methods_seeds.csv``, a row per method,
density and seed, their means ``methods.csv`` and ``methods.md``, and a figure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.study.executors import here
from experiments.study.jobs import Imp, share_level_0
from experiments.study.measures import compared, markdown, measure_all, row_of
from experiments.study.methods import METHODS, Method, methods_of, of_equal_seconds, read_table
from plots.methods import plot
from pyro_lottery.errors import Failed, UserError
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.loaded import load_run

__all__ = ["METHODS", "Method", "main"]
SEEDS = "methods_seeds.csv"


def parser() -> Parser:
    """The command line."""
    parser = Parser("python -m experiments.methods", str(__doc__))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.05, 0.012])
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each method in all (default: 40)")
    parser.add_argument(
        "--equal-seconds",
        type=Path,
        metavar="TABLE",
        help="methods_seeds.csv of equal epochs, whose seconds set the epochs of each method",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    parser.add_argument("--methods", nargs="+", help="their names; default: all")
    parser.add_argument("--add", help="more methods: package.module:NAME of a dict like METHODS")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/methods"), help="folder of all runs (default: runs/methods)"
    )
    parser.add_argument("-o", "--out", type=Path, help="folder of tables and figures; default: --runs")
    shared = (
        "arch",
        "patch_size",
        "dataset",
        "data_dir",
        "image_size",
        "train_size",
        "test_size",
        "batch_size",
        "lr",
        "eval_samples",
    )
    parser.add_options(only=(*shared, "device", "precision"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = vars(parser().parse_args(arguments))
    return run_command("python -m experiments.methods", lambda: work(**given), arguments)


def work(
    densities: list[float],
    epochs: int,
    equal_seconds: Path | None,
    seeds: int,
    methods: list[str] | None,
    add: str | None,
    runs: Path,
    out: Path | None,
    **shared: Any,
) -> None:
    """Train what is not finished, seed by seed, and write tables and figure after every seed; code that methods name is this command's own."""
    chosen = methods_of(methods, add)
    out, first = out or runs, next(iter(chosen))
    _check_table(out / SEEDS, chosen, densities)
    epochs_of: Mapping[tuple[str, float], int] = {}
    if equal_seconds is not None:
        epochs_of = of_equal_seconds(read_table(equal_seconds, densities), chosen)
    jobs: dict[tuple[str, float, int], Imp] = {
        (name, density, seed): Imp(method.config(density, epochs_of.get((name, density), epochs), seed=seed, **shared))
        for seed in range(seeds)
        for density in densities
        for name, method in chosen.items()
    }
    for seed in range(seeds):
        ours = {key: job for key, job in jobs.items() if key[2] == seed}
        failed = here.carry_out(share_level_0(ours.values()), runs)
        places = {
            key: (job.folder(runs).path, chosen[key[0]].level)
            for key, job in jobs.items()
            if key[2] <= seed and job not in failed
        }
        measure_all(places.values())
        table = pd.DataFrame(
            [
                row_of(name, chosen[name], density, load_run(path, trust_code=True).level(level))
                for (name, density, _), (path, level) in places.items()
            ]
        )
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / SEEDS, index=False)
        config = next(iter(jobs.values())).config
        budget = f"{epochs} epochs in all" if equal_seconds is None else f"as long as {first}"
        title = f"{config.arch}, {config.data_name}, {budget}, {seed + 1} seed{'s' if seed else ''}"
        means = compared(table, first)
        (out / "methods.md").write_text(markdown(means, title, first))
        plot(means, title).save("methods", out)
        if failed:
            raise Failed("; ".join(f"{job}: {error}" for job, error in failed.items()))
    print(f"tables and figure: {out}")


def _check_table(path: Path, methods: Iterable[str], densities: Iterable[float]) -> None:
    """Raise ``UserError`` if a table at ``path`` has methods or densities that the new one would lack."""
    if not path.exists():
        return
    try:
        table = pd.read_csv(path)
        left = [*(set(table["method"]) - set(methods)), *map(str, set(table["wanted"]) - set(densities))]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no table of this command ({error}); give another folder by -o") from error
    if left:
        raise UserError(
            f"{path} has {', '.join(sorted(left)[:4])}, which this table would lack; give another folder by -o"
        )


if __name__ == "__main__":
    sys.exit(main())
