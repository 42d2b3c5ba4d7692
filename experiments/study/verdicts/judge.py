"""All claims, each with its statistics and its verdict."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.study.statistics import EQUIVALENT, ERROR, FAILS, HOLDS, UNKNOWN, Part, corrected, holm, together
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
    def networks(self) -> dict[str, str]:
        """The verdict of each network."""
        return {
            name: together([p for p in self.parts if p.network == name])
            for name in dict.fromkeys(p.network for p in self.parts)
        }

    @property
    def verdict(self) -> str:
        """The verdict of all networks, where each has one; that one fails is corrected over the parts of all."""
        found = set(self.networks.values())
        if not found or UNKNOWN in found:
            return UNKNOWN
        if FAILS in found:
            return FAILS if min(holm([part.p_fails for part in self.parts])) <= ERROR else UNKNOWN
        return EQUIVALENT if EQUIVALENT in found else HOLDS


def judge(evidence: Evidence) -> list[Claim]:
    """All claims."""
    return [
        Claim(number, str(claim.__doc__).split("\n")[0].rstrip("."), corrected(claim(evidence.of_claim(number))))
        for number, claim in enumerate(CLAIMS, start=1)
    ]
