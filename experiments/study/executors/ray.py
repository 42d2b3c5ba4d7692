"""Train the runs of a study as tasks of Ray."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.study.executors.worker import train
from experiments.study.jobs import Job, unfinished
from pyro_lottery.errors import Failed, Stopped, UserError, one_line
from pyro_lottery.runs.progress import progress
from pyro_lottery.runs.signals import signals

TRIES = 3
"""How often Ray starts a run again whose worker died."""
SAVE_SECONDS = 60.0
"""Time that workers get to save their work when the study is stopped."""


def carry_out(jobs: Sequence[Job], root: Path, given: argparse.Namespace) -> dict[Job, Exception]:
    """Train every job that is not finished; returns the failed ones with their errors.

    The result of the run that a job is made from is an argument of the job's task, so that Ray orders the tasks. A task
    whose worker died is started again and continues from its checkpoint.
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
        whole, refs = root.resolve(), dict[Job, Any]()
        for job in jobs:  # a job comes after the run that it needs
            needed = job.needs()
            refs[job] = task.remote(job, whole, refs.get(needed) if needed else None, Path.cwd())
        return _wait(ray, refs)
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


def _wait(ray: Any, refs: dict[Job, Any]) -> dict[Job, Exception]:
    """Wait for all tasks and report each; returns the failed ones with their errors."""
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


def _stop(ray: Any, pending: list[Any]) -> None:
    """Interrupt the running tasks, and wait until they have saved."""
    for ref in pending:
        ray.cancel(ref, force=False)
    ray.wait(pending, num_returns=len(pending), timeout=SAVE_SECONDS)
