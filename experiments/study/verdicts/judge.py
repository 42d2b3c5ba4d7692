"""All claims, each with its statistics and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    found = []
    for number, claim in enumerate(CLAIMS, start=1):
        own = evidence.of_claim(number)
        parts = corrected([of_seeds(part, own.seeds(part.network)) for part in claim(own)])
        found.append(Claim(number, str(claim.__doc__).split("\n")[0].rstrip("."), parts))
    return found


def of_seeds(part: Part, needed: int) -> Part:
    """The part, not judged if it has fewer seeds than the study: a look before the end counts by chance, and a seed may be missing because it diverged."""
    if not 0 < len(part.values) < needed:
        return replace(part, needed=needed)
    why_not = part.why_not or f"{len(part.values)} of {needed} seeds"
    return replace(part, needed=needed, p_holds=1.0, p_fails=1.0, p_equivalent=1.0, why_not=why_not)
