"""Effect handlers, one effect a file."""

from pyro_lottery.handlers.local_reparameterization import local_reparameterization
from pyro_lottery.handlers.sparsify import active_mask, sparsify

__all__ = ["active_mask", "local_reparameterization", "sparsify"]
