"""The verdicts as Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.study import kept
from experiments.study.finished import ACCURACIES
from experiments.study.kept import Tables
from experiments.study.markdown import markdown_table
from experiments.study.statistics import EQUIVALENT, Part, bca
from experiments.study.verdicts.evidence import gather
from experiments.study.verdicts.judge import Claim, judge
from pyro_lottery import files


def markdown(claims: Sequence[Claim], lines: Sequence[str], accuracy: str) -> str:
    """A table of verdicts, by network and for all, then the statistics behind each."""
    out = [*(f"- {line}" for line in lines), f"- accuracy: {ACCURACIES[accuracy]}", ""]
    rows = ((c.number, c.text, _networks(c), f"**{c.verdict}**") for c in claims)
    out += markdown_table(("#", "claim", "verdict by network", "all networks"), rows)
    out += [
        "",
        "Could show: how far beyond its bound a mean has to be to count, by the spread of these seeds, if it is the clearest of a claim.",
    ]
    out += ["Sign flips: the p-value of the relation by flips of signs."]
    out += ["Equivalent: the difference that the claim speaks of is within the margin of none."]
    out += ["Worst: the level whose test is clearest, if one makes the statistic fail, else the one furthest out.", ""]
    columns = (
        "#",
        "statistic",
        "mean [95 % interval over seeds]",
        "seeds",
        "holds if",
        "could show",
        "sign flips",
        "verdict",
    )
    parts = (
        (
            c.number,
            p.what,
            _value(p),
            f"{len(p.values)}" + (f" of {p.needed}" if len(p.values) < p.needed else ""),
            p.wanted,
            _number(p.smallest),
            _number(p.p_flips),
            _verdict(p),
        )
        for c in claims
        for p in c.parts
    )
    return "\n".join([*out, *markdown_table(columns, parts)]) + "\n"


def _networks(claim: Claim) -> str:
    return ", ".join(f"{name}: {verdict}" for name, verdict in claim.networks.items())


def _verdict(part: Part) -> str:
    if part.verdict == EQUIVALENT:
        return f"equivalent within {part.margin:g}"
    return part.verdict + (f" ({part.why_not})" if part.why_not else "")


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3g}"


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
    roots: Sequence[Path],
    folder: Path,
    protocol: str | None = None,
    data: str | None = None,
    accuracy: str = "test_accuracy",
) -> str:
    """Judge all claims from the runs in ``roots``, or from what this function has written there, and write ``claims.md``, ``claims.json`` and the
    evidence; returns the Markdown.
    """
    evidence, lines = gather(roots, protocol, data, accuracy)
    claims = judge(evidence)
    text = markdown(claims, lines, accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "claims.md", text.encode())
    files.write_json(folder / "claims.json", to_json(claims, lines, accuracy))
    kept.write(Tables(evidence.levels, evidence.layers), folder)
    return text
