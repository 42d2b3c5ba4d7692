"""The memory that training one of Pyro's guides takes, so that a covariance that is too large is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.infer.autoguide import (
    AutoGuide,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoStructured,
)

from pyro_lottery.errors import UserError
from pyro_lottery.machine import memory

_NUMBERS: dict[type[AutoGuide], Callable[[Sequence[int]], float]] = {
    AutoMultivariateNormal: lambda sizes: 16 * sum(sizes) ** 2,
    AutoLowRankMultivariateNormal: lambda sizes: 13 * sum(sizes) ** 1.5,  # its rank is the root of that sum
    AutoIAFNormal: lambda sizes: 91 * sum(sizes) ** 2,  # autoregressive networks of as many units, and their masks
    AutoStructured: lambda sizes: 6.5 * sum(size**2 for size in sizes),  # a covariance for each site
}
"""How many float32 numbers training holds at its peak over sites of these sizes, to leading order: parameters,
gradients, Adam's moments and intermediate results. The factors are the greatest measured.
"""


def check_memory(kind: type[AutoGuide], sizes: Sequence[int], device: torch.device) -> None:
    """Raise ``UserError`` for a covariance that is larger than the machine's memory, with the memory it would need."""
    count = next((count for known, count in _NUMBERS.items() if issubclass(kind, known)), None)
    if count is None:
        return
    needed = 4 * count(sizes)
    here = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory()
    if needed > here:
        raise UserError(
            f"{kind.__name__} over {sum(sizes):,} weights needs {needed / 2**30:,.1f} GiB to train, and there are "
            f"{here / 2**30:,.1f} GiB; use mean_field or a smaller network"
        )
