"""The posterior of earlier data as the prior of later data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Size

from pyro_lottery.errors import UserError
from pyro_lottery.priors.by_site import Prior
from pyro_lottery.types import Posterior


def from_posterior(posterior: Posterior) -> Prior:
    """N(loc, scale²) with the loc and scale of ``posterior`` for each weight, for continual learning.

    Pruned weights, whose scale is 0, get N(0, 1); under their mask, the prior has no effect. For a guide with
    correlations, the result has the marginals of the posterior. Raises ``UserError`` if the posterior has no scales.
    """
    scales = posterior.scale
    if scales is None:
        raise UserError("a point guide's posterior has no scales, so it cannot be a prior; use a Bayesian guide")
    known = {
        name: (torch.where(scales[name] > 0, loc, 0.0), torch.where(scales[name] > 0, scales[name], 1.0))
        for name, loc in posterior.loc.items()
    }

    def prior(site: str, shape: Size) -> dist.TorchDistribution:
        if site not in known:
            raise UserError(
                f"the posterior used as the prior has no site {site!r}; give the posterior of a network with the same sites"
            )
        return dist.Normal(*known[site])

    return prior
