"""Which of two ways to do the same work is faster on this machine: measured once, and kept in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from pyro_lottery.machine import cache_folder, processor

ROUNDS = 3
"""Measurements of each way, after one that is not counted."""
Work = Callable[[], Callable[[], object]]
"""Prepares a piece of work and returns it as a function."""


def is_faster(first: Work, second: Work, what: str) -> bool:
    """Return whether ``first`` takes less time than ``second``, now or as measured for ``what`` on this processor before.

    ``what`` names the work and all sizes that its time depends on. The first measurement on this processor, with this number
    of threads, counts for all later processes too, so that a run that is stopped and resumed takes the same way.
    """
    return _is_faster(first, second, (what, torch.get_num_threads(), _processor()))


_known: dict[tuple[object, ...], bool] = {}


def _is_faster(first: Work, second: Work, key: tuple[object, ...]) -> bool:
    if key not in _known:
        path = cache_folder() / "faster" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
        found = _read(path)
        if found is None:
            found = _write(path, {"what": key[0], "threads": key[1], **_measure(first, second)})
        _known[key] = float(found["first_ms"]) < float(found["second_ms"])  # type: ignore[arg-type]
    return _known[key]


def _measure(first: Work, second: Work) -> dict[str, float]:
    ways = first(), second()
    times: dict[str, list[float]] = {"first_ms": [], "second_ms": []}
    for _ in range(1 + ROUNDS):
        for found, way in zip(times.values(), ways, strict=True):
            began = time.perf_counter()
            way()
            found.append(1000 * (time.perf_counter() - began))
    return {name: round(min(found[1:]), 4) for name, found in times.items()}


def _read(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        float(found["first_ms"]), float(found["second_ms"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found  # type: ignore[no-any-return]


def _write(path: Path, found: dict[str, object]) -> dict[str, object]:
    """Keep a measurement unless another process kept one first, and return the one that is kept."""
    with suppress(OSError):  # a folder that cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8") as file:
            json.dump(found, file)
            file.flush()
            try:
                os.link(file.name, path)
            except FileExistsError:
                if _read(path) is None:
                    path.write_text(json.dumps(found), "utf-8")
    return _read(path) or found


@functools.cache
def _processor() -> str:
    return hashlib.sha256(processor().encode()).hexdigest()[:16]
