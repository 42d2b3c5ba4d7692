"""Scores of what prior and posterior say of a weight being 0."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch

from pyro_lottery.distributions import base
from pyro_lottery.errors import UserError
from pyro_lottery.priors.improper import Flat
from pyro_lottery.scores.context import Context
from pyro_lottery.types import Posterior, Sites


def savage_dickey(posterior: Posterior, context: Context) -> Sites:
    """log p(0) − log q(0), the log Bayes factor for a weight that is not 0 (Dickey 1971); each tensor has the shape of its site.

    q = N(μ, σ²), and p is the prior, times what weight decay adds to it where that is part of the posterior (``context.weight_decay``). Below 0 the data
    speak for the weight being 0, so that it can be pruned without choosing a density (``--prune-fraction evidence``). Raises ``UserError`` if the posterior
    has no scales, if the prior has no density at 0, or if a prior that is not normal meets weight decay.
    """
    if posterior.scale is None:
        raise UserError("--score savage_dickey needs scales, but a point guide has none; use --score magnitude")
    found = {}
    for site in posterior.prunable or posterior.loc:
        loc = posterior.loc[site]
        q = dist.Normal(loc, posterior.scale[site].clamp(min=torch.finfo(loc.dtype).tiny))
        at_0 = torch.zeros_like(loc)
        prior = context.prior(site)
        if isinstance(prior, Flat):
            raise UserError(
                f"--score savage_dickey: the prior of {site!r} is flat and has no density; choose a proper one"
            )
        found[site] = _with_decay(prior, site, context).log_prob(at_0) - q.log_prob(at_0)
    return found


def _with_decay(prior: Any, site: str, context: Context) -> Any:
    """p(w) exp(−dw²/2) with d = Nλ/T, normalised: for a normal prior again a normal distribution."""
    if not context.weight_decay:
        return prior
    normal = base(prior)
    if not isinstance(normal, dist.Normal):
        raise UserError(
            f"--score savage_dickey: weight decay is part of this posterior's prior, and that of {site!r} is a {type(normal).__name__}, with which it has no "
            "closed form; use --weight-decay 0"
        )
    of_prior = normal.scale**-2
    precision = of_prior + context.model.num_data * context.weight_decay / context.model.kl_temperature
    return dist.Normal(normal.loc * of_prior / precision, precision.rsqrt())
