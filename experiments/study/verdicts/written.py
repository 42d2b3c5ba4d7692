"""The verdicts as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.study.finished import ACCURACIES
from experiments.study.markdown import markdown_table
from experiments.study.statistics import FAILS, HOLDS, UNKNOWN, Part
from experiments.study.verdicts.evidence import gather
from experiments.study.verdicts.judge import Claim, judge
from pyro_lottery import files


def markdown(claims: Sequence[Claim], lines: Sequence[str], accuracy: str) -> str:
    """A table of verdicts, then the statistics behind each."""
    out = [*(f"- {line}" for line in lines), f"- accuracy: {ACCURACIES[accuracy]}", ""]
    columns = ("#", "claim", "statistics that hold / fail / cannot tell", "verdict")
    out += markdown_table(columns, ((c.number, c.text, _counts(c), f"**{c.verdict}**") for c in claims))
    columns = ("#", "statistic", "value [95 % interval over seeds]", "seeds", "holds if", "verdict")
    rows = ((c.number, p.what, _value(p), len(p.values), p.wanted, p.verdict) for c in claims for p in c.parts)
    return "\n".join([*out, "", *markdown_table(columns, rows)]) + "\n"


def _counts(claim: Claim) -> str:
    verdicts = [part.verdict for part in claim.parts]
    return " / ".join(str(verdicts.count(verdict)) for verdict in (HOLDS, FAILS, UNKNOWN))


def _value(part: Part) -> str:
    if not part.values:
        return "no runs"
    low, high = part.interval
    return f"{part.mean:.3g}" + (f" [{low:.3g}, {high:.3g}]" if len(part.values) > 1 else "")


def to_json(claims: Sequence[Claim], lines: Sequence[str], accuracy: str, root: Path) -> list[dict[str, object]]:
    """The claims as plain values: verdict, statistics with value, interval and one number per seed, and their runs."""

    def plain(part: Part) -> dict[str, object]:
        known = len(part.values) > 1
        runs = [str(Path(run).relative_to(root)) for run in part.runs]
        return asdict(part) | {
            "mean": part.mean if part.values else None, "interval": part.interval if known else None, "runs": runs,
        }  # fmt: skip

    evidence = {"evidence": list(lines), "accuracy": accuracy}
    return [
        {"claim": c.number, "text": c.text, "verdict": c.verdict, **evidence, "parts": [*map(plain, c.parts)]}
        for c in claims
    ]


def write(
    root: Path, folder: Path, protocol: str | None = None, data: str | None = None, accuracy: str = "test_accuracy"
) -> str:
    """Judge all claims from the runs in ``root`` and write ``claims.md`` and ``claims.json``; returns the Markdown."""
    evidence, lines = gather(root, protocol, data, accuracy)
    claims = judge(evidence)
    text = markdown(claims, lines, accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "claims.md", text.encode())
    files.write_json(folder / "claims.json", to_json(claims, lines, accuracy, root))
    return text
