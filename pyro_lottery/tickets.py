"""Everything that makes a starting point, as pure functions that return a Ticket."""

from __future__ import annotations

from pyro_lottery import masks
from pyro_lottery.types import Mask, Posterior, Sites, Ticket


def rewind(mask: Mask, start: Posterior, net: Sites) -> Ticket:
    """mask × rewind point (paper §5): survivors at the values of ``start``, pruned weights at (0, 0)."""
    return Ticket(mask, masks.apply(mask, start), net)
