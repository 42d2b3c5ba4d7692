"""Posteriors that are found at a trained point, by the curvature there or by the way to it."""

from pyro_lottery.posteriors.batch_norm import update_batch_norm_
from pyro_lottery.posteriors.curvature import ggn_diagonal, prior_precision
from pyro_lottery.posteriors.found import EXAMPLES, check_findable, find_scales_

__all__ = ["EXAMPLES", "check_findable", "find_scales_", "ggn_diagonal", "prior_precision", "update_batch_norm_"]
