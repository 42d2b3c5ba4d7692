"""What a trained ticket's posterior and mask are like: whether scales and signs moved, which weights count, and what lies between two."""

from pyro_lottery.diagnostics.barriers import Barrier, barrier
from pyro_lottery.diagnostics.paths import on_paths
from pyro_lottery.diagnostics.weights import MOVED, kl_per_site, scales_moved, signs_kept

__all__ = ["MOVED", "Barrier", "barrier", "kl_per_site", "on_paths", "scales_moved", "signs_kept"]
