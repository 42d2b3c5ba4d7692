"""How long a launch, a step and a prediction take, and whether a step waits for the GPU."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

import pyro_lottery as pl
from experiments.benchmarks.candidates import DENSITY, deterministic, ours
from experiments.benchmarks.gpu.day import ESTIMATORS, Checks, Day, held, info, said
from experiments.benchmarks.launches import counted
from experiments.benchmarks.report import markdown, write
from experiments.benchmarks.timing import Step, wait
from pyro_lottery import files

COLUMNS = {
    "network": "{arch}, B {batch}", "precision": "{precision}", "step": "{candidate}", "eager, ms": "{eager:.2f}",
    "graph, ms": "{graph:.2f}", "graph, ratio to det": "{ratio:.2f}", "images/s": "{images:,.0f}",
}  # fmt: skip


def the_machine(day: Day) -> Checks:
    """Versions, the GPU, and how long a launch takes."""
    for name in ("torch", "triton", "pyro-ppl", "pyro-lottery", "timm"):
        try:
            yield info(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield info(name, "not installed")
    yield info("python", platform.python_version())
    if not day.dry:
        yield info("GPU", torch.cuda.get_device_name())
        yield info("memory, GiB", f"{torch.cuda.mem_get_info()[1] / 2**30:.0f}")
        large = torch.empty(2**28, device=day.device)
        other = torch.empty_like(large)
        speed = 2 * large.nbytes / day.ms(lambda: other.copy_(large)) / 1e9
        yield info("copy, TB/s", f"{speed:.2f}", "3 on an H100, 4.3 on an H200")
    one = torch.zeros(1, device=day.device)
    yield info("a launch, µs", f"{1000 * day.ms(lambda: one.add_(1)):.1f}", "3 to 6")


def waits(day: Day) -> Checks:
    """No step waits for the GPU; and its kernels, counted."""
    for arch in day.archs:
        x, y = day.images(day.batch)
        for estimator in ESTIMATORS:
            for density in (1.0, DENSITY):
                step = ours(day.net(arch), x, y, "32", estimator, 1, day.path, density)
                step()
                with _no_waits(day):
                    try:
                        step()
                        found = ""
                    except Exception as error:
                        found = said(error)
                yield held(f"no wait, {arch}, {estimator} at {density:g}", not found, found)
        det = deterministic(day.net(arch), x, y, "32", plain=False)
        sample = ours(day.net(arch), x, y, "32", "weights", 1, day.path, 1.0)
        yield info(f"kernels of {arch}: det, one weight sample", f"{_kernels(day, det)}, {_kernels(day, sample)}")


@contextmanager
def _no_waits(day: Day) -> Iterator[None]:
    if day.dry:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _kernels(day: Day, step: Step) -> int:
    if day.dry:
        return counted(step).total
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        wait(day.device)
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def speed(day: Day) -> Checks:
    """Steps of a network, as they are and as a graph."""
    rows = list[dict[str, Any]]()
    for arch in day.archs:
        for precision in day.precisions:
            yield from _speed(day, arch, precision, rows)
    write(day.out / "speed.csv", rows)
    files.write_atomic(day.out / "speed.md", markdown(rows, COLUMNS).encode())


def _speed(day: Day, arch: str, precision: str, rows: list[dict[str, Any]]) -> Checks:
    x, y = day.images(day.batch)
    det = None
    for estimator, density, path in (
        ("det", 1.0, ""), ("point", 1.0, day.path), ("weights", 1.0, day.path), ("weights", 1.0, "torch"),
        ("weights", DENSITY, day.path), ("local", 1.0, day.path), ("local", 1.0, "torch"),
    ):  # fmt: skip
        if estimator == "det":
            name, step = "det", deterministic(day.net(arch), x, y, precision, plain=False)
        else:
            name = f"{estimator} at {density:g}, kernels {path}"
            step = ours(day.net(arch), x, y, precision, estimator, 1, path, density)
        inside: Any = step  # its optimizer, whose rate a graph reads from the GPU
        optimizer = next(c.cell_contents for c in inside.__closure__ if isinstance(c.cell_contents, torch.optim.Adam))
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3, device=day.device)
        eager = day.ms(step)
        try:
            replayed = day.ms(day.record(step, optimizer))
        except Exception as error:
            yield held(f"a graph of {name}, {arch}, {precision}", False, said(error))
            continue
        det = det or replayed
        rows.append(
            {
                "arch": arch, "batch": day.batch, "precision": precision, "candidate": name, "eager": eager, "graph": replayed,
                "ratio": replayed / det, "images": 1000 * day.batch / replayed,
            }
        )  # fmt: skip
        yield info(
            f"{arch}, {precision}, {name}", f"{eager:.2f} ms, as a graph {replayed:.2f} ms, {replayed / det:.2f} of det"
        )


def predictions(day: Day) -> Checks:
    """Ten samples of each image, by the number of images a pass."""
    x = day.images(8 if day.dry else 10_000)[0]
    model, guide = day.network("resnet20", "weights")
    model.to(day.device, memory_format=torch.channels_last)
    guide.to(day.device)
    for batch in (4, 8) if day.dry else (500, 2_500, 10_000):

        def ten(batch: int = batch) -> object:
            return pl.predict(model, guide, x, 10, batch_size=batch)

        yield info(f"ten samples of {len(x):,} images, {batch:,} a pass", f"{day.ms(ten, 1):.0f} ms")
