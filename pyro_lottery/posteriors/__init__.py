"""Posteriors that are found at a trained point, by the curvature there or by the way to it."""

from pyro_lottery.posteriors.batch_norm import update_batch_norm_
from pyro_lottery.posteriors.curvature import ggn_diagonal, prior_precision
from pyro_lottery.posteriors.found import EXAMPLES, find_scales_, is_found

__all__ = ["EXAMPLES", "find_scales_", "ggn_diagonal", "is_found", "prior_precision", "update_batch_norm_"]
