"""One step of Adam on one batch."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.optim import Adam

from pyro_lottery.distributed import ALONE, Alone
from pyro_lottery.elbo import ELBO
from pyro_lottery.machine import autocast
from pyro_lottery.model import BayesianNetwork

NLL, KL, TALLY, EXAMPLES, FINITE_STEPS = range(5)


def step(
    model: BayesianNetwork,
    guide: AutoGuide,
    elbo: ELBO,
    optimizer: Adam,
    rate: float,
    x: Any,
    y: Tensor,
    samples: int,
    precision: str,
    sums: Tensor,
    share: float = 1.0,
    ranks: Alone = ALONE,
    factor: float = 1.0,
) -> None:
    """One step of Adam. ``share`` weighs the images of a rank that has more or fewer than the others, so that the mean of
    the ranks' gradients is the gradient of the whole batch. ``factor`` multiplies the KL, but not in ``sums``.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    for sample in range(samples):  # one backward pass a sample, so that memory does not grow with the samples
        with autocast(y.device, precision):
            terms = elbo.terms(model, guide, x, y, closed_forms=0 if sample else samples)
        ((share * terms.nll + factor * terms.kl) / (model.num_data * samples)).backward()
        with torch.no_grad():
            tally = model.tally(terms.output, y)
            nll = terms.nll * (len(y) / model.num_data)
            sums[:EXAMPLES] += torch.stack([nll, terms.kl / ranks.world, tally]).float() / samples
        del terms  # or its graph would live until the next sample's is complete
    ranks.mean_(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    optimizer.step()
    sums[EXAMPLES] += len(y)
    sums[FINITE_STEPS] += sums[:TALLY].isfinite().all() / ranks.world  # a likelihood may have no mean
