"""Train the runs of a study as array jobs of SLURM, each described by a batch script.

A job is ``python -m experiments.study.executors.slurm JOBS NUMBER``, where JOBS is a JSON file that lists the runs. Before its
time limit SLURM sends it SIGUSR1: it saves, asks SLURM to requeue it (``scontrol requeue``), and exits with 75. When it starts
again it continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.study.executors.worker import train
from experiments.study.jobs import Imp, Job, from_json, to_json, unfinished
from pyro_lottery.errors import Stopped, UserError
from pyro_lottery.files import write_atomic
from pyro_lottery.runs.signals import signals

WARNING_SECONDS = 120
"""SLURM sends SIGUSR1 this long before the time limit."""
REQUEUE_SECONDS = 60
"""How long ``scontrol requeue`` may take."""


def submit(jobs: Sequence[Job], root: Path, given: argparse.Namespace) -> list[str]:
    """Submit the jobs that are not finished as at most three array jobs; returns SLURM's ids, as ``17_3``.

    The first array trains level 0 of runs that others share it with, the second the runs, the third what is made from their tickets.
    Each starts after the one before has ended, since SLURM's dependencies are between whole jobs, not their levels.
    Raises ``UserError`` if there is no ``sbatch`` here, or if it refuses a script.
    """
    if not shutil.which("sbatch"):
        raise UserError("--executor slurm: sbatch was not found here; --dry-run prints what would be submitted")
    root, submitted, before = root.resolve(), list[str](), None
    for wave in waves(jobs, root):
        script = batch_script(wave, root, given, after=before)
        path = jobs_file(wave, root)
        path.parent.mkdir(parents=True, exist_ok=True)  # SLURM does not make the folder of its logs
        write_atomic(path, _content(wave, root))
        answer = subprocess.run(["sbatch", "--parsable"], input=script, text=True, capture_output=True)
        if answer.returncode:
            raise UserError(f"--executor slurm: sbatch refused the job ({' '.join(answer.stderr.split())})")
        before = answer.stdout.strip().partition(";")[0]  # JOB or JOB;CLUSTER
        submitted += [f"{before}_{number}" for number in range(len(wave))]
    return submitted


def dry_run(jobs: Sequence[Job], root: Path, given: argparse.Namespace) -> str:
    """The batch scripts that ``submit`` would submit."""
    after = (None, "JOB_ID_OF_THE_FIRST_ARRAY", "JOB_ID_OF_THE_SECOND_ARRAY")
    return "\n".join(batch_script(wave, root, given, id) for wave, id in zip(waves(jobs, root), after, strict=False))


def waves(jobs: Iterable[Job], root: Path) -> list[list[Job]]:
    """The jobs that are not finished: first level 0 of the runs that others share it with, then runs, then what needs their tickets."""
    left = [job for job in jobs if unfinished(job, root)]
    shared = dict.fromkeys(job.shares for job in left if isinstance(job, Imp) and job.shares)
    dense: list[Job] = [Imp(replace(job.config, levels=0)) for job in shared if 0 in unfinished(job, root)]
    return [wave for wave in (dense, [j for j in left if not j.needs()], [j for j in left if j.needs()]) if wave]


def batch_script(wave: Sequence[Job], root: Path, given: argparse.Namespace, after: str | None = None) -> str:
    """The batch script of one array job; ``after`` is the id of a job that must have ended, however it ended."""
    options: dict[str, object] = {
        "job-name": "pyro_lottery",
        "array": f"0-{len(wave) - 1}%{min(len(wave), given.max_parallel)}",
        "nodes": 1, "ntasks": 1, "cpus-per-task": max(1, round(given.cpus_per_run)),
        "time": given.time_limit, "signal": f"USR1@{WARNING_SECONDS}",
        "output": root / "logs" / "slurm" / "%A_%a.log", "open-mode": "append",
    }  # fmt: skip
    if given.gpus_per_run != 0 and (given.gpus_per_run or getattr(given, "device", "auto") != "cpu"):
        options["gpus-per-node"] = max(1, round(given.gpus_per_run or 1))
    if given.partition:
        options["partition"] = given.partition
    if after:
        options["dependency"] = f"afterany:{after}"
    work = ["-u", "-m", "experiments.study.executors.slurm", str(jobs_file(wave, root))]
    lines = ["#!/bin/bash", "#SBATCH --requeue"]
    lines += [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items()]
    lines += [f"# {number}: {job}" for number, job in enumerate(wave)]
    command = shlex.join(["srun", "--unbuffered", sys.executable, *work])
    return "\n".join([*lines, f'exec {command} "$SLURM_ARRAY_TASK_ID"', ""])


def jobs_file(wave: Sequence[Job], root: Path) -> Path:
    """The file that lists the jobs of an array, named by its content: a later study does not change a waiting one's."""
    return root / "logs" / "slurm" / f"{zlib.crc32(_content(wave, root)):08x}.json"


def _content(wave: Sequence[Job], root: Path) -> bytes:
    listed = {"root": str(root), "jobs": [to_json(job) for job in wave]}
    return (json.dumps(listed, indent=1) + "\n").encode()


def run_job(job: Job, root: Path) -> int:
    """Train one job of an array; returns the exit code: 0 finished, 1 failed, 75 saved and stopped."""
    needed = job.needs()
    try:
        with signals() as received:
            failure = train(job, root, "unfinished" if needed and unfinished(needed, root) else None)
    except Stopped:
        if signal.SIGUSR1 in received:  # else somebody cancelled the job
            _requeue()
        return 75
    if failure:
        print(failure, file=sys.stderr)
    return 1 if failure else 0


def _requeue() -> None:
    number = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", number], check=True, timeout=REQUEUE_SECONDS)


def main(arguments: Sequence[str]) -> int:
    """``python -m experiments.study.executors.slurm JOBS NUMBER``; returns the exit code."""
    listed = json.loads(Path(arguments[0]).read_bytes())
    return run_job(from_json(listed["jobs"][int(arguments[1])]), Path(listed["root"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
