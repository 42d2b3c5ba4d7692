"""Markdown tables: the one place that writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table: the names of the columns, a rule, and a line per row. Cells are written by ``str``.

    >>> print("\\n".join(markdown_table(["level", "density"], [[0, 1.0], [1, "80 %"]])))
    | level | density |
    |---|---|
    | 0 | 1.0 |
    | 1 | 80 % |
    """
    head = [_line(columns), "|" + "---|" * len(columns)]
    return [*head, *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
