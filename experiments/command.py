"""The command line of all experiments: train what is not finished of a study, then plot its figures."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from experiments.study.estimate import duration, seconds_left
from experiments.study.executors import here, ray, slurm
from experiments.study.executors.options import add_options, check
from experiments.study.finished import read
from experiments.study.jobs import Job, Study, share_level_0, unfinished, untrained
from experiments.study.plan import plan
from experiments.study.protocols import PROTOCOLS, extent
from plots.command import plot_figures
from pyro_lottery import nets
from pyro_lottery.errors import Failed, UserError
from pyro_lottery.runs.cli import Parser, run_command

FIGURES = ("fig1", "fig2", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "table1")
SHARED = ("dataset", "data_dir", "image_size", "device", "precision", "on_divergence", "deterministic")
"""Options of ``python -m pyro_lottery.imp`` that hold for every run of a study."""


def main(stem: str, arguments: Sequence[str] | None = None) -> int:
    """``python -m experiments.STEM``: train what its figure needs and plot it; returns the exit code."""
    module = importlib.import_module(f"experiments.{stem}")
    given = parser(stem, str(module.__doc__)).parse_args(arguments)
    return run_command(f"python -m experiments.{stem}", lambda: work([stem], given), arguments)


def parser(stem: str, description: str) -> Parser:
    """The options of an experiment."""
    parser = Parser(f"python -m experiments.{stem}", description)
    parser.add_argument(
        "--protocol", default="paper", help=f"{', '.join(PROTOCOLS)}: see experiments/study/protocols.py"
    )
    parser.add_argument("--arch", nargs="+", help="networks; default: the protocol's")
    parser.add_argument("--seeds", type=int, help="number of seeds to train, from 0; default: the protocol's")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--figures", type=Path, help="folder for figures and tables; default: figures within --runs")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, what is finished and the time left")
    parser.add_argument("--plan", action="store_true", help="print what the study will cost, from steps measured here")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs, or workers on a machine without, to plan for")
    add_options(parser)
    parser.add_options(only=SHARED)
    return parser


def work(stems: Sequence[str], given: argparse.Namespace, then: Callable[[Path, str], object] | None = None) -> None:
    """Train and plot ``stems``, then call ``then`` with the folder of figures and the name of the data; with ``--plan`` or
    ``--dry-run`` only print what would be done. Failed runs are reported at the end, after the figures are plotted.
    """
    study = study_of(given)
    jobs = share_level_0(jobs_of(stems, study))
    check(given)
    if given.plan:
        study_jobs = {stem: jobs_of([stem], study) for stem in stems}
        print(plan(study_jobs, given.runs, given))
        return
    if given.dry_run:
        if given.executor == "slurm":
            print(slurm.dry_run(jobs, given.runs.resolve(), given))
        else:
            print_plan(jobs, given.runs)
        return
    if given.executor == "slurm":
        submitted = slurm.submit(jobs, given.runs, given)
        print(f"{len(submitted)} runs submitted{''.join(f', {job}' for job in submitted[:1])}; when they are")
        print("finished, the same command with --executor none plots the figures")
        return
    failed: dict[Job, Exception] = {}
    if given.executor == "ray":
        failed = ray.carry_out(jobs, given.runs, given)
    elif given.executor == "here":
        failed = here.carry_out(jobs, given.runs)
    listed = "; ".join(f"{job}: {error}" for job, error in failed.items())
    failure = Failed(f"{len(failed)} of {len(jobs)} runs failed: {listed}")
    folder, data = given.figures or given.runs / "figures", jobs[0].config.data_name
    try:
        for missing in plot_figures(stems, read(given.runs, study.protocol, data, only=study.archs), folder):
            print(f"not plotted: {missing}")
        if then:
            then(folder, data)
        print(f"figures: {folder}")
    except UserError as error:
        raise (failure if failed else error) from error
    if failed:
        raise failure


def study_of(given: argparse.Namespace) -> Study:
    """The study that the options describe."""
    found = extent(given.protocol)
    count = found.seeds if given.seeds is None else given.seeds
    if count < 1:
        raise UserError(f"--seeds must be at least 1, got {count}")
    for arch in given.arch or ():
        nets.check_name(arch)
    options = {name: getattr(given, name) for name in SHARED if hasattr(given, name)}
    return Study(given.protocol, found, tuple(given.arch or found.archs), tuple(range(count)), options)


def jobs_of(stems: Iterable[str], study: Study) -> list[Job]:
    """The runs that the figures need, without duplicates, in the order of the figures."""
    modules = [importlib.import_module(f"experiments.{stem}") for stem in stems]
    return list(dict.fromkeys(job for module in modules for job in module.jobs(study)))


def print_plan(jobs: Iterable[Job], root: Path) -> None:
    """Print every run with its finished levels, and the time left, estimated from a measured step."""
    total = 0.0
    for job in jobs:
        left = unfinished(job, root)
        seconds = seconds_left(job, untrained(job, root), root) if left else 0.0
        total += seconds
        state = f"{duration(seconds)} left" if left else "finished"
        print(f"{job}: {len(job.levels) - len(left)} of {len(job.levels)} levels, {state}, {job.folder(root).path}")
    print(f"together: {duration(total)} left, one run after the other, from a measured step")
