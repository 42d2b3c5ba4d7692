"""What training made of the weights of a ticket, site by site."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lottery.distributions import base
from pyro_lottery.errors import UserError
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.types import Mask, Posterior

MOVED = 0.05
"""The relative change by which a scale has left its start."""


def scales_moved(start: Posterior, trained: Posterior, mask: Mask) -> dict[str, float]:
    """The fraction of each site's survivors with |σ/σ₀ − 1| > ``MOVED``; NaN for a site without survivors.

    A posterior whose scales stay where they started says nothing of the data. ``start`` and ``trained`` hold tensors of the sites'
    shapes. Raises ``UserError`` if one of them has no scales.
    """
    if start.scale is None or trained.scale is None:
        raise UserError("a point guide has no scales that could have moved")
    return {
        name: _mean(((scale / start.scale[name] - 1).abs() > MOVED)[_kept(mask, name, scale)])
        for name, scale in trained.scale.items()
    }


def signs_kept(start: Posterior, trained: Posterior, mask: Mask) -> dict[str, float]:
    """The fraction of each prunable site's survivors whose loc has the sign that it started with; NaN for a site without survivors.

    Tickets may owe much to their initial signs (Zhou et al. 2019). ``start`` and ``trained`` hold tensors of the sites' shapes.
    """
    return {
        name: _mean((trained.loc[name].sign() == start.loc[name].sign())[_kept(mask, name, trained.loc[name])])
        for name in trained.prunable
    }


def kl_per_site(model: BayesianNetwork, posterior: Posterior, mask: Mask) -> dict[str, float]:
    """KL(q‖p) of each site in nats, summed over its survivors; NaN where the prior has no closed form.

    q = N(loc, scale²) for every weight, whatever the guide. ``posterior`` holds tensors of the sites' shapes. Raises ``UserError`` if it has no scales.
    """
    if posterior.scale is None:
        raise UserError("a point guide has no KL divergence from the prior")
    return {
        name: _kl(model, name, loc, posterior.scale[name], _kept(mask, name, loc))
        for name, loc in posterior.loc.items()
    }


def _kl(model: BayesianNetwork, name: str, loc: Tensor, scale: Tensor, kept: Tensor) -> float:
    prior: Any = base(model.prior_of(name))
    try:
        each = kl_divergence(dist.Normal(loc.double(), scale.double().clamp(min=1e-300)), prior)
    except NotImplementedError:
        return math.nan
    return float(each.expand(loc.shape)[kept].sum())


def _kept(mask: Mask, name: str, like: Tensor) -> Tensor:
    return mask[name] if name in mask else torch.ones_like(like, dtype=torch.bool)


def _mean(of: Tensor) -> float:
    return float(of.double().mean())
