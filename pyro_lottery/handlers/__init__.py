"""Pyro effect handlers: one effect per file."""

from pyro_lottery.handlers.draws_apart import DrawsApart
from pyro_lottery.handlers.flops import count_flops
from pyro_lottery.handlers.local_reparameterization import local_reparameterization
from pyro_lottery.handlers.sparse_layers import sparse_layers
from pyro_lottery.handlers.sparsify import active_mask, are_as_drawn, as_drawn, left_out, not_hidden, sparsify

__all__ = [
    "DrawsApart",
    "active_mask",
    "are_as_drawn",
    "as_drawn",
    "count_flops",
    "left_out",
    "local_reparameterization",
    "not_hidden",
    "sparse_layers",
    "sparsify",
]
