"""Files of a run that are changed at random, and read."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings

import pyro_lottery as pl
from pyro_lottery import untrusted
from pyro_lottery.errors import Damaged
from pyro_lottery.runs.folder import RunFolder
from tests.soak.bombs import bombs
from tests.soak.child import Figures, start, undisturbed
from tests.soak.mutations import mutations, reseal


def damaged_files(root: Path, count: int) -> Figures:
    """Change files of a run at random, ``count`` times, half of them with a checksum that fits, and read them."""
    whole, *_ = undisturbed(root)
    run = root / "mutated"
    child = start(run)
    while not (run / "level_00" / "ticket.safetensors").exists():
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 75, child.log.read_text()
    checkpoint = next(run.glob("level_*/checkpoint.safetensors")).read_bytes()
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    (run / "level_00" / "checkpoint.safetensors").write_bytes(checkpoint)

    readers = _readers(run)
    contents = {name: (run / name).read_bytes() for name in readers}
    right = {name: read() for name, read in readers.items()}
    found, wrong, slowest, most = Counter[str](), [], 0.0, 0.0

    def one(mutation: tuple[str, bytes, bool]) -> None:
        nonlocal slowest, most
        name, data, resealed = mutation
        data = reseal(name, data) if resealed else data
        if data == contents[name]:
            return
        (run / name).write_bytes(data)
        found["files"] += 1
        before, began = _peak(), time.monotonic()
        try:
            value = readers[name]()
            if resealed or _same(value, right[name]):
                found["read, and right or valid"] += 1
            else:
                found["silently wrong"] += 1
                wrong.append(f"{name}: {data[:2000]!r}")
        except (pl.UserError, Damaged) as error:
            found["refused in one line" if "\n" not in str(error) else "refused in several lines"] += 1
        except Exception as error:  # what would be a traceback
            found["tracebacks"] += 1
            wrong.append(f"{name}: {type(error).__name__} {error}"[:300])
        slowest, most = max(slowest, time.monotonic() - began), max(most, _peak() - before)
        (run / name).write_bytes(contents[name])

    quiet = settings(
        max_examples=count + count // 10, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    quiet(given(mutations(contents))(one))()
    for name in ("silently wrong", "tracebacks", "refused in several lines"):
        found[name] += 0
    largest = max(map(len, contents.values())) / 2**20
    return {
        **found, "slowest, s": round(slowest, 2), "most memory that one took, MiB": round(most, 1),
        "largest file, MiB": round(largest, 2), "bombs refused": bombs(root, whole), "what": wrong[:5],
    }  # fmt: skip


def _peak() -> float:
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _readers(run: Path) -> dict[str, Callable[[], Any]]:
    """How each file of a run is read, as a value that can be compared."""
    folder = RunFolder(run)
    level = folder.level(0)

    def ticket() -> Any:
        found = pl.Ticket.load(level.path / "ticket.safetensors")
        return [found.mask, found.start.loc, found.start.scale, found.net, found.start.prunable]

    def posterior() -> Any:
        found, net = level.load_posterior()
        return [found.loc, found.scale, found.prunable, found.draws, net]

    def checkpoint() -> Any:
        return list(untrusted.load_tensors(level.checkpoint))

    def network() -> Any:
        return pl.load_run(run).level(0).load_model().predict(torch.zeros(1, 1, 8, 8), 1)

    return {
        "level_00/ticket.safetensors": ticket,
        "level_00/posterior.safetensors": posterior,
        "level_00/checkpoint.safetensors": checkpoint,
        "config.json": lambda: [pl.load_run(run).config, network()],
        "results.csv": lambda: pl.load_run(run).results.to_dict(),
        "level_00/level.json": lambda: [asdict(pl.load_run(run).row(0)), pl.load_run(run).results.to_dict()],
        "level_00/history.csv": lambda: pl.load_run(run).level(0).history.to_dict(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (a != a and b != b)
