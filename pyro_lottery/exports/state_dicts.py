"""Pruned networks as state dicts of PyTorch: with zeros, as ``torch.nn.utils.prune`` keeps them, or with sparse matrices."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyro_lottery.errors import unknown
from pyro_lottery.types import Sites, Ticket

LAYOUTS = ("state_dict", "prune", "csr")


def state_dict(ticket: Ticket, layout: str = "state_dict") -> dict[str, Tensor]:
    """The loc of every site and the rest of the network, named as in the plain network, with 0 at pruned weights.

    ``layout`` is ``state_dict``, with zeros; ``prune``, with NAME_orig and NAME_mask for each prunable weight, of its shape; or ``csr``, with a
    sparse matrix for each prunable weight of two dimensions. Raises ``UserError`` for another layout.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    found: dict[str, Tensor] = {**ticket.net}
    for name, loc in ticket.start.loc.items():
        found |= _entries(name, loc, ticket.mask.get(name), layout)
    return found


def _entries(name: str, loc: Tensor, mask: Tensor | None, layout: str) -> Sites:
    if mask is None:
        return {name: loc}
    value = loc * mask
    if layout == "prune":
        return {f"{name}_orig": loc, f"{name}_mask": mask.to(loc.dtype)}
    if layout == "csr" and loc.ndim == 2:
        return {name: _csr(value, mask)}
    return {name: value}


def _csr(value: Tensor, mask: Tensor) -> Tensor:
    """A CSR matrix that stores exactly the weights that ``mask`` keeps, those that are 0 included."""
    kept = mask.bool()
    rows = torch.cat((torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(rows, kept.nonzero()[:, 1], value[kept], value.shape, check_invariants=True)
