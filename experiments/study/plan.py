"""What a study will cost before it is begun: wall time, hours of devices, memory and disk, of the whole and of each figure, and
what more workers would gain. Steps are measured here, on random images, with as many processes at once as will share the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from experiments.study.estimate import duration, like, measure, seconds_of, sizes
from experiments.study.jobs import Job, share_level_0, unfinished, untrained
from experiments.study.markdown import markdown_table
from experiments.study.walltime import Work, critical_path, makespan, trainings
from pyro_lottery import machine
from pyro_lottery.errors import UserError
from pyro_lottery.model import random_parameters
from pyro_lottery.runs.build import Shape, sketch
from pyro_lottery.runs.config import Config, from_json

WORKERS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Cost:
    """The cost of one kind of run on this machine."""

    step: float
    """Seconds of a training step."""
    forward: float
    """Seconds to predict one image from one weight sample."""
    memory: float
    """Peak memory in bytes, of the process on a CPU; on a GPU of its tensors, with what CUDA itself takes."""
    start: float
    """Seconds before the first step: imports and data."""


def measure_together(config: Config, together: int, threads: int) -> Cost:
    """The median cost of ``together`` simultaneous runs of ``config`` with ``threads`` each; raises ``UserError`` if they fail."""
    command = [sys.executable, "-m", "experiments.study.plan", json.dumps(like(config).options()), str(time.time())]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, env=environment, **pipes) for _ in range(together)]
    outputs = [child.communicate() for child in children]
    for child, (_, complaint) in zip(children, outputs, strict=True):
        if child.returncode:
            last = complaint.strip().splitlines()[-1:]
            raise UserError(f"{config.arch} cannot be measured, {together} at a time: {''.join(last)}")
    found = [Cost(**json.loads(out)) for out, _ in outputs]
    return Cost(*(statistics.median(getattr(c, f.name) for c in found) for f in fields(Cost)))


def disk(config: Config, shape: Shape) -> int:
    """Bytes of a finished level: its ticket (with one byte of mask per prunable weight) and its posterior."""
    net = sketch(config, shape)
    sites = {name: getattr(layer, attribute) for name, layer, attribute in random_parameters(net)}
    weights = sum(value.numel() for value in sites.values())
    rest = sum(t.numel() * t.element_size() for name, t in net.state_dict().items() if name not in sites)
    values = 1 if config.guide == "deterministic" else 2
    return weights + 2 * (4 * values * weights + rest)


def plan(by_figure: Mapping[str, Sequence[Job]], root: Path, given: argparse.Namespace) -> str:
    """The plan of the figures' jobs as text."""
    jobs = list(dict.fromkeys(job for several in by_figure.values() for job in several))
    left = {job: found for job in share_level_0(jobs) if (found := unfinished(job, root))}
    device = machine.resolve_device(jobs[0].config.device)
    share = given.gpus_per_run or 1.0
    per_gpu = max(1, int(1 / share + 1e-9))  # as in Ray, where no run uses parts of two GPUs
    workers = max(1, given.gpus * per_gpu if share <= 1 else int(given.gpus / share))
    cores = os.cpu_count() or 1
    threads = max(1, int(given.cpus_per_run))
    together = per_gpu if device.type == "cuda" else max(1, min(workers, cores // threads))
    if workers == 1:
        threads = torch.get_num_threads()
    costs: dict[Config, Cost] = {}
    for job in left:
        kind = like(job.config)
        if kind not in costs:
            costs[kind] = measure_together(job.config, together, threads)

    def work_of(several: Iterable[Job]) -> dict[Job, Work]:
        """What the unfinished jobs of ``several`` train, and those that they need; they share level 0 among themselves."""
        found = {}
        for job in share_level_0(with_needs(several)):
            if job in left and (levels := untrained(job, root)):
                cost = costs[like(job.config)]
                seconds = {level: seconds_of(job.config, [level], cost.step, cost.forward) for level in levels}
                found[job] = Work(cost.start, seconds)
        return found

    bytes_of = {job: len(levels) * disk(job.config, _shape(job.config)) for job, levels in left.items()}

    where = f"{device.type}, {together} at a time" + (f", {threads} threads each" if device.type == "cpu" else "")
    unit = "GPU hours" if device.type == "cuda" else "hours of a worker"
    lines = [f"steps measured here ({where}); {workers} workers", ""]
    rows: list[Sequence[object]] = []
    for name, several in [*by_figure.items(), ("together", jobs)]:
        chosen = work_of(several)
        levels = sum(len(work.levels) for work in chosen.values())
        wall, hours = duration(makespan(chosen, workers)), share * sum(w.seconds for w in chosen.values()) / 3600
        size = sum(bytes_of[job] for job in chosen) / 2**30
        # The largest runs may train at the same time.
        peaks = sorted((costs[like(job.config)].memory for job in chosen), reverse=True)[:workers]
        rows += [(name, len(chosen), levels, wall, f"{hours:.2f}", f"{sum(peaks) / 2**30:.2f}", f"{size:.2f}")]
    lines += markdown_table(("figure", "runs", "levels", "wall time", unit, "memory, GiB", "disk, GiB"), rows)
    rows = [
        (f"{kind.arch}, {kind.guide}, {kind.batch_size}", f"{1000 * cost.step:.0f}", f"{cost.memory / 2**30:.2f}")
        for kind, cost in costs.items()
    ]
    lines += ["", *markdown_table(("network, guide, batch", "step, ms", "memory of a run, GiB"), rows)]
    work = work_of(jobs)
    walls: dict[object, float] = {count: makespan(work, count) for count in sorted({*WORKERS, workers})}
    walls["any number"] = critical_path(work)
    alone = makespan(work, 1)
    rows = [(count, duration(wall), f"{alone / max(wall, 1e-9):.1f}") for count, wall in walls.items()]
    lines += ["", *markdown_table(("workers", "wall time", "speed-up"), rows)]
    lines += ["", f"critical path: {trainings(work)} trainings one after the other, {duration(critical_path(work))}"]
    return "\n".join(lines)


def with_needs(jobs: Iterable[Job]) -> list[Job]:
    """``jobs``, each after the job that it needs."""
    return list(dict.fromkeys(each for job in jobs for each in (job.needs(), job) if each is not None))


def _shape(config: Config) -> Shape:
    train, _, channels, size, classes = sizes(config.dataset, config.data_dir, config.image_size)
    return Shape(classes, channels, size, train, 0)


def _peak() -> int:
    """Peak memory of this process in bytes; 0 if the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _context() -> int:
    """Bytes of a GPU that CUDA takes for this process, beside tensors; those of other processes count too, if there are any."""
    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved())


def main(arguments: Sequence[str]) -> int:
    """Measure one kind of run in this process, so that its peak memory is that of the run."""
    config = from_json(json.loads(arguments[0]))
    sizes(config.dataset, config.data_dir, config.image_size)  # reads the data if they are here
    start = time.time() - float(arguments[1])
    machine.keep_memory()  # as in the commands
    step, forward = measure(config)
    memory = _peak()
    if machine.resolve_device(config.device).type == "cuda":
        train, test, channels, size, _ = sizes(config.dataset, config.data_dir, config.image_size)
        memory = torch.cuda.max_memory_reserved() + _context() + (train + test) * channels * math.prod(size)
    found: dict[str, Any] = {"step": step, "forward": forward, "memory": memory, "start": start}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
