"""The options that say where the runs of a study are trained."""

from __future__ import annotations

import argparse

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.runs.cli import Parser

EXECUTORS = ("here", "ray", "slurm", "none")


def add_options(parser: Parser) -> None:
    """Add the options to the command line of an experiment."""
    parser.add_argument(
        "--executor", default="here", help=f"where to train: {', '.join(EXECUTORS)}; none only plots finished runs"
    )
    parser.add_argument("--ray-address", help="a running Ray cluster; default: one on this machine, for this command")
    parser.add_argument("--cpus-per-run", type=float, default=1.0, help="processors of a run (default: 1)")
    parser.add_argument(
        "--gpus-per-run", type=float, help="GPUs of a run; 0.5 lets two runs share one; default: 1, without GPUs 0"
    )
    parser.add_argument("--time-limit", type=int, default=1440, help="minutes of a SLURM job (default: 1440)")
    parser.add_argument("--max-parallel", type=int, default=16, help="SLURM jobs at a time (default: 16)")
    parser.add_argument("--partition", help="SLURM's partition")


def check(given: argparse.Namespace) -> None:
    """Raise ``UserError`` for impossible options, before anything is trained."""
    if given.executor not in EXECUTORS:
        raise unknown("--executor", given.executor, EXECUTORS)
    for name in ("cpus_per_run", "time_limit", "max_parallel"):
        if not getattr(given, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0, got {getattr(given, name)}")
    if given.gpus_per_run is not None and not given.gpus_per_run >= 0:
        raise UserError(f"--gpus-per-run must be at least 0, got {given.gpus_per_run}")
    share = given.gpus_per_run or 0
    if share > 1 and share != int(share):
        raise UserError(f"--gpus-per-run must be a whole number above 1, got {share}")
    if given.ray_address and given.executor != "ray":
        raise UserError("--ray-address is for --executor ray")
