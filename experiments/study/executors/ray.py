"""Train the runs of a study as tasks of Ray.

A run is one task. A control or transplant becomes a task as soon as one of its tickets exists, and again when there are more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.study.executors.worker import train
from experiments.study.jobs import Job, ready, released, unfinished
from pyro_lottery.errors import Failed, Stopped, UserError, one_line
from pyro_lottery.runs.progress import progress
from pyro_lottery.runs.signals import signals

LOOK_SECONDS = 2.0
"""Longest time between two looks at which levels are finished."""
TRIES = 3
"""How often Ray starts a run again whose worker died."""
SAVE_SECONDS = 60.0
"""Time that workers get to save their work when the study is stopped."""


def carry_out(jobs: Sequence[Job], root: Path, given: argparse.Namespace) -> dict[Job, Exception]:
    """Train every job that is not finished; returns the failed ones with their errors.

    A task whose worker died is started again and continues from its checkpoint.
    """
    jobs = [job for job in jobs if unfinished(job, root)]
    if not jobs:
        return {}
    ray = _start(given.ray_address)
    try:
        there = ray.cluster_resources()
        gpus = given.gpus_per_run
        if gpus is None:
            gpus = 1.0 if there.get("GPU", 0) else 0.0
        for name, kind, wanted in (("cpus", "CPU", given.cpus_per_run), ("gpus", "GPU", gpus)):
            if wanted > there.get(kind, 0):
                raise UserError(
                    f"--{name}-per-run is {wanted:g}, but the cluster has {there.get(kind, 0):g} {kind}s; ask for no more"
                )
        # A process that has used a GPU stays on it, even if Ray gives its next task another; hence one task a process.
        options = {"max_retries": TRIES, "retry_exceptions": [Stopped], "max_calls": 1 if gpus else 0}
        task = ray.remote(num_cpus=given.cpus_per_run, num_gpus=gpus, **options)(train)
        whole, here = root.resolve(), Path.cwd()
        return _carry_out(ray, lambda job: task.remote(job, whole, None, here), jobs, whole)
    finally:
        ray.shutdown()


def _start(address: str | None) -> Any:
    """Join the cluster at ``address``, or start one on this machine for this process; returns Ray's module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # a training has the same priority with Ray as without
    if not address:
        # A cluster that runs code for anyone who can connect must not listen to the network. Ray binds a cluster of a
        # single machine, which it assumes on a Mac, to the loopback interface alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("--executor ray needs ray: pip install -e '.[ray]'") from error
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
        raise UserError(
            f"Ray listens at {found}, not only on the loopback interface; start a cluster and pass --ray-address"
        )
    return ray


def _carry_out(ray: Any, start: Callable[[Job], Any], jobs: Sequence[Job], root: Path) -> dict[Job, Exception]:
    """``start`` a task for every job that has something to train, until all have ended; returns the failed ones."""
    failed, waiting, running = dict[Job, Exception](), list(jobs), dict[Any, Job]()
    with signals() as received, received.heeded(), progress() as bar:
        shown = bar.add_task("runs", total=len(jobs))

        def end(job: Job, failure: str | None) -> None:
            if failure:
                failed[job] = Failed(failure)
            bar.advance(shown)
            if bar.disable:
                print(f"{job}: {failure or 'finished'} ({len(waiting) + len(running)} to go)", flush=True)

        while waiting or running:
            if received:
                _stop(ray, list(running))
                raise Stopped
            for each in waiting.copy():
                waiting.remove(each)
                job = released(each, failed)
                if job.needs() in failed:
                    end(job, "the run that it is made from failed")
                elif ready(job, root):
                    running[start(job)] = job
                elif unfinished(job, root):
                    waiting.append(job)
                else:  # another study, which shares the folder, has trained it
                    end(job, None)
            if not running:  # another process trains what these jobs are made from
                time.sleep(LOOK_SECONDS if waiting else 0)
                continue
            done, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
            for ref in done:
                job, failure = running.pop(ref), _failure(ray, ref)
                if failure is None and unfinished(job, root):
                    waiting.append(job)  # it waits for its other tickets
                else:
                    end(job, failure)
    return failed


def _failure(ray: Any, ref: Any) -> str | None:
    """Why a task that has ended failed, or None."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return f"its worker was stopped or died {TRIES + 1} times ({one_line(error)})"


def _stop(ray: Any, pending: list[Any]) -> None:
    """Interrupt the running tasks, and wait until they have saved."""
    for ref in pending:
        ray.cancel(ref, force=False)
    ray.wait(pending, num_returns=len(pending), timeout=SAVE_SECONDS)
