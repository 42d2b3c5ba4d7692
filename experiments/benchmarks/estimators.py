"""Question: which gradient estimator trains better: ten weight samples a batch (the paper's), one, or local reparameterization?

Each trains the same dense network from the same seeds, once for equal epochs and once for about equal wall time, with
epochs inversely proportional to the measured cost of a step. Finished runs are not trained again.

Reduced protocol: 3,000 training and 2,000 test images, batch 64, no pruning, learning rate to a tenth after half and
three quarters of the epochs.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from experiments.study.markdown import markdown_table
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.loaded import Run

PROG = "python -m experiments.benchmarks.estimators"

ESTIMATORS = {"ten weight samples": ("weights", 10), "one weight sample": ("weights", 1), "local": ("local", 1)}
EPOCHS = {
    "equal epochs": dict.fromkeys(ESTIMATORS, 6),
    "equal time": {"ten weight samples": 3, "one weight sample": 26, "local": 12},
}


def configs(arch: str, dataset: str, data_dir: str, seeds: int, shrink: int = 1) -> dict[tuple[str, str], list[Config]]:
    """The runs by comparison and estimator, one per seed; ``shrink`` divides images and epochs, for a quick trial."""
    found = {}
    for comparison, epochs in EPOCHS.items():
        for name, (estimator, samples) in ESTIMATORS.items():
            count = max(2, epochs[name] // shrink)
            found[comparison, name] = [
                Config(
                    arch=arch, dataset=dataset, data_dir=data_dir, train_size=3000 // shrink, test_size=2000 // shrink,
                    batch_size=64, levels=0, epochs=count, milestones=tuple(sorted({count // 2, count * 3 // 4})),
                    estimator=estimator, train_samples=samples, history_samples=1, seed=seed,
                )
                for seed in range(seeds)
            ]  # fmt: skip
    return found


def markdown(runs: dict[tuple[str, str], list[Run]]) -> str:
    """Mean and standard deviation over seeds as a Markdown table."""
    lines = list[Sequence[object]]()
    for (comparison, name), group in runs.items():
        rows = [run.folder.results()[0] for run in group]
        cells = [
            _cell([100 * row.test_accuracy for row in rows], " %", 1),
            *(_cell([getattr(row, column) for row in rows], "", 3) for column in ("nll", "mace")),
            _cell([row.train_seconds for row in rows], "", 0),
        ]
        lines.append((comparison, name, group[0].config.epochs, *cells, len(rows)))
    columns = ("comparison", "estimator", "epochs", "accuracy", "NLL", "MACE", "seconds", "seeds")
    return "\n".join(markdown_table(columns, lines))


def _cell(values: Sequence[float], unit: str, digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{unit}"


def parser() -> Parser:
    """The command line."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=1, help="divide images and epochs, to try the command out")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished and print the table; returns the exit code."""
    given = parser().parse_args(arguments)

    def work() -> None:
        wanted = configs(given.arch, given.dataset, given.data_dir, given.seeds, given.shrink)
        print(markdown({key: [run_imp(config) for config in group] for key, group in wanted.items()}))

    return run_command(PROG, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
