"""What tests share."""

import time
from pathlib import Path

DEADLOCK = 3600.0
"""Seconds after which a process that a test started is taken for stuck; one beside other work may need many minutes."""


def wait_for(condition, process=None):
    """Wait until ``condition()`` holds, while ``process`` is running, where one brings it about."""
    end = time.monotonic() + DEADLOCK
    while not condition():
        assert process is None or process.poll() is None, f"the process ended early with {process.returncode}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def fingerprint(run: Path) -> tuple[dict[str, bytes], dict[str, list[list[str]]]]:
    """Everything that must be equal in equal runs: all safetensors, and all columns of the tables but times."""
    tensors = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}
    tables = {}
    for path in sorted(run.rglob("*.csv")):
        header, *rows = [line.split(",") for line in path.read_text().splitlines()]
        keep = [i for i, name in enumerate(header) if name not in ("train_seconds", "step_ms", "seconds", "crc32")]
        tables[str(path.relative_to(run))] = [[row[i] for i in keep] for row in (header, *rows)]
    return tensors, tables
