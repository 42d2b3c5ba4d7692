"""Scores of what prior and posterior say of a weight being 0."""

from __future__ import annotations

import pyro.distributions as dist
import torch

from pyro_lottery.errors import UserError
from pyro_lottery.priors.improper import Flat
from pyro_lottery.scores.context import Context
from pyro_lottery.types import Posterior, Sites


def savage_dickey(posterior: Posterior, context: Context) -> Sites:
    """log p(0) − log q(0), the log Bayes factor for a weight that is not 0 (Dickey 1971); each tensor has the shape of its site.

    q = N(μ, σ²), and p is the prior. Below 0 the data speak for the weight being 0, so that it can be pruned without choosing a
    density (``--prune-fraction evidence``). Raises ``UserError`` if the posterior has no scales, or the prior no density at 0.
    """
    if posterior.scale is None:
        raise UserError("--score savage_dickey needs scales, but a point guide has none; use --score magnitude")
    found = {}
    for site, loc in posterior.loc.items():
        q = dist.Normal(loc, posterior.scale[site].clamp(min=torch.finfo(loc.dtype).tiny))
        at_0 = torch.zeros_like(loc)
        prior = context.prior(site)
        if isinstance(prior, Flat):
            raise UserError(
                f"--score savage_dickey: the prior of {site!r} is flat and has no density; choose a proper one"
            )
        found[site] = prior.log_prob(at_0) - q.log_prob(at_0)
    return found
