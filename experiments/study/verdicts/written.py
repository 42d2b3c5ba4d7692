"""The verdicts as Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.study.finished import ACCURACIES
from experiments.study.markdown import markdown_table
from experiments.study.statistics import EQUIVALENT, UNKNOWN, Part, bca
from experiments.study.verdicts.evidence import gather, keep
from experiments.study.verdicts.judge import Claim, judge
from pyro_lottery import files


def markdown(claims: Sequence[Claim], lines: Sequence[str], accuracy: str) -> str:
    """A table of verdicts, by network and for all, then the statistics behind each."""
    out = [*(f"- {line}" for line in lines), f"- accuracy: {ACCURACIES[accuracy]}", ""]
    rows = ((c.number, c.text, _networks(c), f"**{c.verdict}**") for c in claims)
    out += markdown_table(("#", "claim", "verdict by network", "all networks"), rows)
    columns = ("#", "statistic", "mean [95 % interval over seeds]", "seeds", "holds if", "sign flips", "verdict")
    parts = (
        (c.number, p.what, _value(p), len(p.values), p.wanted, _flips(p), _verdict(p)) for c in claims for p in c.parts
    )
    return "\n".join([*out, "", *markdown_table(columns, parts)]) + "\n"


def _networks(claim: Claim) -> str:
    return ", ".join(f"{name}: {verdict}" for name, verdict in claim.networks.items())


def _verdict(part: Part) -> str:
    if part.verdict == EQUIVALENT:
        return f"equivalent within {part.margin:g}"
    seen = part.verdict == UNKNOWN and math.isfinite(part.smallest)
    return part.verdict + (f" (alone only if {part.smallest:.2g} from the bound)" if seen else "")


def _flips(part: Part) -> str:
    return "" if part.p_flips is None else f"{part.p_flips:.3g}"


def _value(part: Part) -> str:
    if not part.values:
        return "no runs"
    low, high = part.interval
    return f"{part.mean:.3g}" + (f" [{low:.3g}, {high:.3g}]" if len(part.values) > 1 else "")


def to_json(claims: Sequence[Claim], lines: Sequence[str], accuracy: str) -> list[dict[str, object]]:
    """The claims as plain values: verdicts, statistics with mean, intervals, p-values and one number per seed, and their runs."""

    def plain(part: Part) -> dict[str, object]:
        known = len(part.values) > 1
        return asdict(part) | {
            "mean": part.mean if part.values else None, "interval": part.interval if known else None,
            "bca_interval": bca(part.values),
        }  # fmt: skip

    evidence = {"evidence": list(lines), "accuracy": accuracy}
    return [
        {
            "claim": c.number,
            "text": c.text,
            "verdict": c.verdict,
            "networks": c.networks,
            **evidence,
            "parts": [*map(plain, c.parts)],
        }
        for c in claims
    ]


def write(
    root: Path, folder: Path, protocol: str | None = None, data: str | None = None, accuracy: str = "test_accuracy"
) -> str:
    """Judge all claims from the runs in ``root``, or from what this function has written there, and write ``claims.md``, ``claims.json`` and the
    evidence; returns the Markdown.
    """
    evidence, lines = gather(root, protocol, data, accuracy)
    claims = judge(evidence)
    text = markdown(claims, lines, accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "claims.md", text.encode())
    files.write_json(folder / "claims.json", to_json(claims, lines, accuracy))
    keep(evidence, folder)
    return text
