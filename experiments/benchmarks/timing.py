"""Times several steps in turns, so that other load on the machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]


TOGETHER = {"cpu": 1, "cuda": 50}
"""Steps of a round. A GPU is not waited for between them, as in training: it runs a step while Python prepares the next."""


def time_steps(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step: ``rounds`` rounds that go through all steps in turn, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    together = TOGETHER[device.type]
    for turn in range(rounds + 2):
        for name, step in steps.items():
            wait(device)
            began = time.perf_counter()
            for _ in range(together):
                step()
            wait(device)
            if turn >= 2:
                seconds[name].append((time.perf_counter() - began) / together)
    return seconds


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio_rows(
    arch: str, batch: int, precision: str, seconds: dict[str, list[float]], reference: str
) -> list[dict[str, Any]]:
    """One row per candidate: the median step and the ratio to ``reference`` in the same round (median, minimum, maximum)."""
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        rows.append(
            {
                "arch": arch, "batch": batch, "precision": precision, "candidate": name, "rounds": len(own),
                "step_ms": 1000 * statistics.median(own), "ratio": statistics.median(ratios), "least": min(ratios),
                "greatest": max(ratios),
            }
        )  # fmt: skip
    return rows
