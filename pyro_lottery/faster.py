"""Which way to do a piece of work is fastest on this machine: measured once, and kept in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pyro_lottery.machine import cache_folder, processor

ROUNDS = 3
"""Measurements of each way, after one that is not counted."""
Work = Callable[[], Callable[[], object]]
"""Prepares a piece of work and returns it as a function."""


def fastest(ways: Mapping[str, Work], what: str) -> str:
    """Return the name of the way that takes the least time, now or as measured for ``what`` on this processor before.

    ``what`` names the work and all sizes that its time depends on. The first measurement on this processor, with this number
    of threads, counts for all later processes too, so that a run that is stopped and resumed takes the same way.
    """
    key = what, torch.get_num_threads(), _processor()
    if key not in _known:
        path = cache_folder() / "fastest" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
        found = _read(path, ways)
        if found is None:
            found = _write(path, ways, {"what": what, "threads": key[1], "ms": _measure(ways)})
        _known[key] = min(ways, key=found.__getitem__)
    return _known[key]


def is_faster(first: Work, second: Work, what: str) -> bool:
    """Return whether ``first`` takes less time than ``second``: :func:`fastest` of two."""
    return fastest({"second": second, "first": first}, what) == "first"


_known: dict[tuple[object, ...], str] = {}


def _measure(ways: Mapping[str, Work]) -> dict[str, float]:
    ready: dict[str, Callable[[], object]] = {name: way() for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + ROUNDS):
        for name, way in ready.items():
            began = time.perf_counter()
            way()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: round(min(found[1:]), 4) for name, found in times.items()}


def _read(path: Path, ways: Mapping[str, Work]) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_text("utf-8"))["ms"]
        return {name: float(found[name]) for name in ways}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, ways: Mapping[str, Work], found: dict[str, Any]) -> dict[str, float]:
    """Keep a measurement unless another process kept one first, and return the times of the one that is kept."""
    with suppress(OSError):  # a folder that cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder, "found.json")
            file.write_text(json.dumps(found), "utf-8")
            with suppress(OSError):  # a file system without hard links, or another process was first
                os.link(file, path)
            if _read(path, ways) is None:
                os.replace(file, path)
    return _read(path, ways) or found["ms"]


@functools.cache
def _processor() -> str:
    return hashlib.sha256(processor().encode()).hexdigest()[:16]
