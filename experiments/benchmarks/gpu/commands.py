"""Whole commands on a GPU: resumed bit for bit, an IMP from its start to its end, and several runs at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd

from experiments.benchmarks.gpu.day import Checks, Day, held, info

SMOKE = ("imp", "--arch", "lenet", "--preset", "smoke")


def resume(day: Day) -> Checks:
    """``--deterministic`` runs end with the same files: once more, and stopped and resumed."""
    large = ("imp", "--arch", "resnet20", "--dataset", "digits", "--preset", "quick")
    found = list[dict[str, bytes]]()
    for name in ("first", "stopped") if day.dry else ("first", "stopped", "again"):
        folder = day.out / f"resume-{name}"
        line = [*(SMOKE if day.dry else large), "--deterministic", "--run-dir", str(folder)]
        if name == "stopped":
            child = day.start(*line)
            while child.poll() is None and not (folder / "level_00").exists():
                time.sleep(0.05)
            child.terminate()
            child.communicate()
            yield info("stopped with", child.returncode, "75, or 0 if it had finished")
        done = day.start(*line)
        complaint = done.communicate()[1]
        if done.returncode:
            yield held(f"imp --deterministic, {name}", False, complaint.strip()[-200:])
            return
        found.append({str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))})
    yield held("the same files when stopped and resumed", found[0] == found[1], f"{len(found[0])} files")
    if not day.dry:  # a CPU's bits are always the same
        yield held("the same files twice", found[0] == found[2])


def whole_imp(day: Day) -> Checks:
    """IMP of three levels, as users start it, with and without a graph."""
    large = ["imp", "--arch", "resnet20", *_images(day), "--levels", "2", "--epochs", "6", "--milestones", "3", "5"]
    for choice in ("auto",) if day.dry else ("auto", "off"):
        folder = day.out / f"imp-{choice}"
        began = time.perf_counter()
        child = day.start(*(SMOKE if day.dry else large), "--graph", choice, "--run-dir", str(folder))
        complaint = child.communicate()[1]
        if child.returncode:
            yield held(f"imp --graph {choice}", False, complaint.strip()[-200:])
            continue
        table = pd.read_csv(folder / "results.csv")
        ms, accuracy = table["step_ms"].iloc[-1], table["test_accuracy"]
        yield info(
            f"imp --graph {choice}",
            f"{len(table)} levels in {time.perf_counter() - began:.0f} s, {ms:.2f} ms a step, accuracy {accuracy.iloc[0]:.3f} to "
            f"{accuracy.iloc[-1]:.3f}; 21 levels of 160 epochs of CIFAR-10 would take {21 * 160 * 391 * ms / 3.6e6:.1f} h",
        )


def shares(day: Day) -> Checks:
    """Several runs on one GPU at a time: each has its turn, or, under NVIDIA's MPS, their kernels run together."""
    alone = 0.0
    for mps in (False, True):
        with _mps(day, mps) as runs:
            for count in ((2,) if day.dry else (1, 2, 4, 8)) if runs else ():
                name = f"{count} runs at a time" + " under MPS" * mps
                rate, complaint = _together(day, count, "mps" if mps else "turns")
                alone = alone or rate
                yield held(name, not complaint, complaint or f"{rate:.0f} steps/s, {rate / alone:.2f} times one run's")
        if not runs:
            yield info("MPS", "cannot be started here")


def _together(day: Day, count: int, name: str) -> tuple[float, str]:
    """Steps per second of all of ``count`` runs together, and what a run said that failed."""
    large = ("imp", "--arch", "resnet20", *_images(day), "--train-size", "6400", "--test-size", "500", "--levels", "0")
    options = SMOKE if day.dry else (*large, "--epochs", "20", "--milestones", "15", "--precision", "32")
    folders = [day.out / f"share-{name}-{count}-{k}" for k in range(count)]
    children = [day.start(*options, "--seed", str(k), "--run-dir", str(f)) for k, f in enumerate(folders)]
    said = [child.communicate()[1] for child in children]
    if any(child.returncode for child in children):
        return 0.0, "".join(said).strip()[-200:]
    return sum(1000 / pd.read_csv(folder / "results.csv")["step_ms"].iloc[0] for folder in folders), ""


@contextmanager
def _mps(day: Day, wanted: bool) -> Iterator[bool]:
    """Within this context commands share the GPU through NVIDIA's MPS; False if it cannot be started."""
    if not wanted:
        yield True
        return
    control = shutil.which("nvidia-cuda-mps-control")
    if day.dry or not control:
        yield False
        return
    with tempfile.TemporaryDirectory() as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(variables)
        try:
            yield not subprocess.run([control, "-d"], check=False).returncode
        finally:
            subprocess.run([control], input="quit\n", text=True, check=False)
            for variable in variables:
                del os.environ[variable]


def _images(day: Day) -> tuple[str, ...]:
    return ("--dataset", "folder", "--data-dir", day.data_dir) if day.data_dir else ("--dataset", "digits")
