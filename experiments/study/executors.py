"""Where the runs of a study are trained: here, one after the other; by Ray's workers; or as array jobs of SLURM.

A run is a process's work as a whole, is killed and repeated at will, and finds by itself what is left of it: so a worker that dies
needs no more than to be started again. A run that fails stops no other.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from experiments.study.jobs import Job, unfinished
from pyro_lottery import machine
from pyro_lottery.errors import Busy, Failed, Stopped, UserError, one_line, unknown
from pyro_lottery.runs.cli import Parser
from pyro_lottery.runs.progress import progress
from pyro_lottery.runs.signals import signals

EXECUTORS = ("here", "ray", "slurm", "none")
WAIT_SECONDS = 5.0
"""Between two looks at runs that other processes are at work in."""
TRIES = 3
"""How often Ray starts a run again whose worker died."""
SAVE_SECONDS = 60.0
"""That Ray's workers are given to save what they do, when a study is stopped."""
WARNING_SECONDS = 120
"""Before its time limit a job of SLURM gets SIGUSR1, saves and is requeued."""


def add_options(parser: Parser) -> None:
    """The options that say where runs are trained."""
    parser.add_argument(
        "--executor", default="here", help=f"where to train: {', '.join(EXECUTORS)}; none draws what is finished"
    )
    parser.add_argument("--ray-address", help="a running Ray cluster; default: one on this machine, for this command")
    parser.add_argument("--cpus-per-run", type=float, default=1.0, help="processors of a run (default: 1)")
    parser.add_argument(
        "--gpus-per-run", type=float, help="GPUs of a run, 0.5 lets two share one; default: 1 but where there are none"
    )
    parser.add_argument("--time-limit", type=int, default=1440, help="of a SLURM job, in minutes (default: 1440)")
    parser.add_argument("--max-parallel", type=int, default=16, help="SLURM jobs at a time (default: 16)")
    parser.add_argument("--partition", help="of SLURM")


def check(given: argparse.Namespace) -> None:
    """Raise ``UserError`` for options that cannot be, before anything is trained."""
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


def carry_out(jobs: Iterable[Job], root: Path) -> dict[Job, Exception]:
    """Run every job that is not finished, in this process; returns those that failed and why.

    Several processes may share the work: a run at which another one is at work is left for later.
    """
    root.mkdir(parents=True, exist_ok=True)
    waiting, failed = [job for job in jobs if unfinished(job, root)], dict[Job, Exception]()
    refused, count = list[UserError](), len(waiting)
    with signals() as received, received.heeded():
        while waiting:
            later = []
            for place, job in enumerate(waiting):
                if received:
                    raise Stopped
                needed = job.needs()
                if needed in failed:
                    failed[job] = Failed("what it is made from failed")
                elif (needed and unfinished(needed, root)) or job.folder(root).busy():
                    later.append(job)
                elif unfinished(job, root):
                    print(f"{job} ({len(waiting) - place + len(later)} to go)", flush=True)
                    try:
                        job.run(root)
                    except Busy:  # another process was quicker
                        later.append(job)
                    except Stopped:
                        raise
                    except Exception as error:
                        with _logging(job, root) as log:
                            traceback.print_exc(file=log)
                            failed[job] = Failed(f"{one_line(error)}; see {log.name}")
                        if isinstance(error, UserError):
                            refused.append(error)
            if len(later) == len(waiting):
                time.sleep(WAIT_SECONDS)
            waiting = later
    if refused and len(failed) == count:  # nothing could be begun, by what all runs have in common
        raise refused[0]
    return failed


def log_of(job: Job, root: Path) -> Path:
    """Where a worker writes what ``job`` prints."""
    return root / "logs" / f"{'-'.join(job.folder(root).path.relative_to(root).parts)}.log"


@contextmanager
def _logging(job: Job, root: Path) -> Iterator[TextIO]:
    log = log_of(job, root)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        yield file


def train(job: Job, root: Path, failure: str | None = None, here: Path | None = None) -> str | None:
    """Train what is not finished of ``job``, in a worker, with its output in its log; returns why it failed, or None.

    ``failure`` is that of the run from whose tickets ``job`` is made; ``here`` is the folder from which the study was
    started, and to which relative paths belong.
    """
    if failure:
        return "what it is made from failed"
    if here:
        os.chdir(here)
    if not unfinished(job, root):
        return None
    with _logging(job, root) as file, redirect_stdout(file), redirect_stderr(file):
        machine.keep_memory()  # as in the commands
        print(f"begin {job}, levels {unfinished(job, root)}, pid {os.getpid()}", flush=True)
        try:
            while unfinished(job, root):
                try:
                    job.run(root)
                except Busy as error:  # of another study that shares the folder, or of a worker that is about to die
                    print(error)
                    time.sleep(WAIT_SECONDS)
        except Stopped:
            print("stopped, everything is saved")
            raise
        except Exception as error:
            traceback.print_exc()
            return f"{one_line(error)}; see {file.name}"
        print(f"end {job}")
    return None


def with_ray(jobs: Sequence[Job], root: Path, given: argparse.Namespace) -> dict[Job, Exception]:
    """Train ``jobs`` as Ray's tasks: what a job is made from is its argument, so that the graph is Ray's, and a task whose
    worker dies is started again and goes on from its checkpoint.
    """
    jobs = [job for job in jobs if unfinished(job, root)]
    if not jobs:
        return {}
    ray = _start_ray(given.ray_address)
    try:
        there = ray.cluster_resources()
        gpus = given.gpus_per_run
        if gpus is None:
            gpus = 1.0 if there.get("GPU", 0) else 0.0
        for name, kind, wanted in (("cpus", "CPU", given.cpus_per_run), ("gpus", "GPU", gpus)):
            if wanted > there.get(kind, 0):
                raise UserError(f"--{name}-per-run is {wanted:g}, and the cluster has {there.get(kind, 0):g} {kind}s")
        # A process that has used one GPU stays on it, whatever Ray gives to its next task: so it has none.
        options = {"max_retries": TRIES, "retry_exceptions": [Stopped], "max_calls": 1 if gpus else 0}
        task = ray.remote(num_cpus=given.cpus_per_run, num_gpus=gpus, **options)(train)
        whole, refs = root.resolve(), dict[Job, Any]()
        for job in jobs:  # what a job needs comes before it
            needed = job.needs()
            refs[job] = task.remote(job, whole, refs.get(needed) if needed else None, Path.cwd())
        return _wait(ray, refs)
    finally:
        ray.shutdown()


def _start_ray(address: str | None) -> Any:
    """Join the cluster at ``address``, or start one of this machine, for this process; returns the module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # a training is worth as much on Ray as elsewhere
    if not address:
        # Nobody else on this machine's network shall be able to run code through a cluster that this command starts:
        # Ray binds one that is for a single machine, as it does by itself on a Mac, to the loopback interface.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray = _import("ray")
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": path}}, **({} if address else {"include_dashboard": False}),
        )  # fmt: skip
    except ConnectionError as error:
        raise UserError(f"--ray-address {address}: {one_line(error)}") from error
    if not address and not (found := ray.get_runtime_context().gcs_address).startswith("127.0.0.1:"):
        ray.shutdown()
        raise UserError(f"Ray listens at {found}, not on the loopback interface alone; start it, and say --ray-address")
    return ray


def _stop(ray: Any, pending: list[Any]) -> None:
    """Interrupt what is at work, and wait until it is saved."""
    for ref in pending:
        ray.cancel(ref, force=False)
    ray.wait(pending, num_returns=len(pending), timeout=SAVE_SECONDS)


def _wait(ray: Any, refs: dict[Job, Any]) -> dict[Job, Exception]:
    failed: dict[Job, Exception] = {}
    by_ref = {ref: job for job, ref in refs.items()}
    pending = list(by_ref)
    with signals() as received, received.heeded(), progress() as bar:
        shown = bar.add_task("runs", total=len(refs))
        while pending:
            if received:
                _stop(ray, pending)
                raise Stopped
            done, pending = ray.wait(pending, timeout=1.0)
            for ref in done:
                try:
                    failure = ray.get(ref)
                except ray.exceptions.RayError as error:
                    failure = f"its worker was stopped or died {TRIES + 1} times ({one_line(error)})"
                if failure:
                    failed[by_ref[ref]] = Failed(failure)
                bar.advance(shown)
                if bar.disable:
                    print(f"{by_ref[ref]}: {failure or 'finished'} ({len(pending)} to go)", flush=True)
    return failed


@dataclass(frozen=True)
class Task:
    """A job of SLURM, which requeues it when its time is over, and records it as failed when it fails."""

    job: Job
    root: Path

    def __call__(self) -> None:
        needed = self.job.needs()
        failure = "unfinished" if needed and unfinished(needed, self.root) else None
        try:
            with signals() as received:
                failure = train(self.job, self.root, failure)
            if failure:
                raise Failed(failure)
        except Stopped:
            if signal.SIGUSR1 not in received:  # somebody cancels the job
                raise SystemExit(75) from None
            try:
                signal.raise_signal(signal.SIGUSR1)  # now submitit's: it requeues the job and ends the process
            except SystemExit as ended:
                raise SystemExit(75 if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else ended.code) from None
            raise

    def checkpoint(self) -> Any:
        """What submitit starts when the job is back: the same, which finds by itself what is left."""
        return _import("submitit").helpers.DelayedSubmission(self)


def with_slurm(jobs: Sequence[Job], root: Path, given: argparse.Namespace, cluster: str = "slurm") -> list[Any]:
    """Submit ``jobs`` that are not finished as two array jobs, the second of those that are made from a run's tickets;
    returns submitit's jobs. ``cluster`` ``local`` runs them as processes of this machine.
    """
    submitit = _import("submitit")
    root = root.resolve()
    submitted: list[Any] = []
    for wave in waves(jobs, root):
        try:
            executor = submitit.AutoExecutor(root / "logs" / "slurm", cluster=cluster, slurm_max_num_timeout=1000)
        except RuntimeError as error:
            raise UserError(f"--executor slurm: {one_line(error)}; --dry-run prints what would be submitted") from error
        options = slurm_options(given)
        if submitted and cluster == "slurm":
            options["slurm_dependency"] = f"afterany:{submitted[0].job_id.split('_')[0]}"
        executor.update_parameters(**options)
        for job in submitted if cluster == "local" else ():
            job.wait()
        submitted += executor.submit_array([Task(job, root) for job in wave])
    return submitted


def waves(jobs: Iterable[Job], root: Path) -> list[list[Job]]:
    """The jobs that are not finished: those that need no other, and then those that do."""
    left = [job for job in jobs if unfinished(job, root)]
    return [wave for wave in ([j for j in left if not j.needs()], [j for j in left if j.needs()]) if wave]


def sbatch(jobs: Sequence[Job], root: Path, given: argparse.Namespace) -> str:
    """What ``with_slurm`` would submit, as text."""
    _import("submitit")
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    shown = []
    for number, wave in enumerate(waves(jobs, root)):
        options = {name.removeprefix("slurm_"): value for name, value in slurm_options(given).items()}
        names = SlurmExecutor._equivalence_dict() or {}
        options = {names.get(name, name): value for name, value in options.items() if name != "name"}
        options |= {"job_name": "pyro_lottery", "map_count": len(wave)}
        if number:
            options["dependency"] = "afterany:JOB_ID_OF_THE_FIRST_ARRAY"
        command = "python -m submitit.core._submit FOLDER"
        shown += [_make_sbatch_string(command, root / "logs" / "slurm" / "%j", **options)]
        shown += [f"# {place}: {job}" for place, job in enumerate(wave)]
    return "\n".join(shown)


def _import(name: str) -> Any:
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # which submitit reads when it is imported
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = {"submitit": "slurm"}.get(name, name)
        raise UserError(f"--executor {extra} needs {name}: pip install -e '.[{extra}]'") from error


def slurm_options(given: argparse.Namespace) -> dict[str, Any]:
    """The resources of a run, as submitit names them."""
    options: dict[str, Any] = {
        "name": "pyro_lottery", "timeout_min": given.time_limit, "cpus_per_task": max(1, round(given.cpus_per_run)),
        "slurm_array_parallelism": given.max_parallel, "slurm_signal_delay_s": WARNING_SECONDS,
        "slurm_setup": ["export SUBMITIT_PREEMPT_SIGNAL=USR1"],
    }  # fmt: skip
    if given.gpus_per_run != 0 and (given.gpus_per_run or getattr(given, "device", "auto") != "cpu"):
        options["gpus_per_node"] = max(1, round(given.gpus_per_run or 1))
    if given.partition:
        options["slurm_partition"] = given.partition
    return options
