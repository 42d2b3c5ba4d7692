"""Effect handlers, one effect a file."""

from pyro_lottery.handlers.sparsify import active_mask, sparsify

__all__ = ["active_mask", "sparsify"]
