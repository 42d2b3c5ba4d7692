"""One step of Adam on one batch: what :func:`pyro_lottery.train` repeats, and what a loop of one's own can call."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.optim import Adam

from pyro_lottery import trees
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.elbo import ELBO
from pyro_lottery.machine import autocast, channels_last, products
from pyro_lottery.model import BayesianNetwork

NLL, TEMPERED_KL, TALLY, EXAMPLES, FINITE_STEPS = range(5)
"""Places in the sums that :func:`step` adds to."""


def step(
    model: BayesianNetwork,
    guide: AutoGuide,
    elbo: ELBO,
    optimizer: Adam,
    x: Any,
    y: Tensor,
    *,
    samples: int = 1,
    precision: str = "32",
    kl_factor: float = 1.0,
    sums: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Take one step of ``optimizer`` on one batch (paper §3), at the learning rates in its parameter groups.

    Minimises (nll + ``kl_factor``·T·KL) / N, averaged over ``samples`` noise samples: N is ``model.num_data``, T is
    ``model.kl_temperature``, and nll is scaled up from the batch to N examples. ``x`` holds normalised inputs as the network
    takes them and ``y`` the targets, on the device of ``model``; ``precision`` is ``32``, ``tf32`` or ``bf16``. Of several ``ranks``,
    each takes its share of the batch, or all of it with noise of its own, and gradients are averaged.

    Returns ``sums`` [5], or new ones, to which this step is added in place: the nll of the batch and T·KL, both in nats and
    means over the samples; the model's tally (correct predictions, or squared errors); the number of examples; and the number
    of steps before nll or KL was first not finite. The host does not wait for a GPU.
    """
    count = len(y)
    x, y = trees.map_tensors(lambda t: channels_last(ranks.share(t)), x), ranks.share(y)
    # Weighs ranks with more or fewer examples, so that the mean of their gradients is the gradient of the whole batch.
    share = len(y) * ranks.world / count if ranks.parallel == "data" else 1.0
    sums = torch.zeros(5, dtype=torch.float32, device=y.device) if sums is None else sums
    optimizer.zero_grad()
    for sample in range(samples):  # one backward pass a sample, so that memory does not grow with the samples
        with autocast(y.device, precision):
            # The closed-form KL is the same for all samples, so the first computes it for all of them.
            terms = elbo.terms(model, guide, x, y, closed_forms=0 if sample else samples)
        with products(y.device, precision):
            loss = _times(share, terms.nll)
            if terms.tempered_kl.requires_grad:  # a point guide's is 0 under the flat prior
                loss = loss + _times(kl_factor, terms.tempered_kl)
            (loss / (model.num_data * samples)).backward()
        with torch.no_grad():
            tally = model.tally(terms.output, y)
            nll = terms.nll * (len(y) / model.num_data)
            each = torch.stack([nll, _part(terms.tempered_kl, ranks.world), tally]).float()
            sums[:EXAMPLES].add_(_part(each, samples))
        del terms  # or its graph would live until the next sample's is complete
    ranks.mean_(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    optimizer.step()
    sums[EXAMPLES].add_(len(y))
    # Without the tally, which is NaN for a likelihood that has no mean.
    sums[FINITE_STEPS].add_(_part(torch.linalg.vector_norm(sums[:TALLY], 1) < torch.inf, ranks.world))
    return sums


def _part(total: Tensor, count: int) -> Tensor:
    """``total / count``, without a kernel to launch if it is the same."""
    return total if count == 1 else total / count


def _times(factor: float, value: Tensor) -> Tensor:
    return value if factor == 1 else factor * value
