"""Columns of the benchmark's tables in Markdown, and its CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.study.markdown import markdown_table
from pyro_lottery import files

STEP_COLUMNS = {
    "network": "{arch}, B {batch}", "precision": "{precision}", "step": "{candidate}", "ms": "{step_ms:.0f}",
    "ratio to det": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
EVALUATION_COLUMNS = {
    "network": "{arch}, {batch} images", "precision": "{precision}", "evaluation": "{candidate}", "ms": "{step_ms:.0f}",
    "ratio to the loop": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
KERNEL_COLUMNS = {
    "kernel": "{arch}", "weights": "{batch:,}", "made by": "{candidate}", "ms": "{step_ms:.1f}",
    "ratio to torch": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
VARIANCE_COLUMNS = {
    "network": "{arch}, B {batch}", "estimator": "{candidate}", "ms": "{ms:.0f}", "variance of loc's gradient": "{loc_ratio:.3f}",
    "of log-scale's": "{log_scale_ratio:.3f}", "efficiency, loc": "{loc_efficiency:.2f}", "log-scale": "{log_scale_efficiency:.2f}",
}  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """The chosen columns of ``rows`` as a Markdown table."""
    return "\n".join(markdown_table(list(columns), ([text.format(**row) for text in columns.values()] for row in rows)))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, pd.DataFrame(rows).to_csv(index=False).encode())
