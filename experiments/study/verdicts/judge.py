"""All claims, each with its statistics and its verdict."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.study.statistics import Part, together
from experiments.study.verdicts.evidence import Evidence
from experiments.study.verdicts.layers_and_controls import claim_6, claim_7, claim_8
from experiments.study.verdicts.schedules_and_sizes import claim_12, claim_13, claim_14
from experiments.study.verdicts.tickets import claim_1, claim_2, claim_3, claim_4, claim_5
from experiments.study.verdicts.transplants import claim_9, claim_10, claim_11

CLAIMS = (
    claim_1, claim_2, claim_3, claim_4, claim_5, claim_6, claim_7, claim_8, claim_9, claim_10, claim_11, claim_12,
    claim_13, claim_14,
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim with its statistics and its verdict."""

    number: int
    text: str
    parts: list[Part]

    @property
    def verdict(self) -> str:
        return together(part.verdict for part in self.parts)


def judge(evidence: Evidence) -> list[Claim]:
    """All claims."""
    return [
        Claim(number, str(claim.__doc__).split("\n")[0].rstrip("."), claim(evidence))
        for number, claim in enumerate(CLAIMS, start=1)
    ]
