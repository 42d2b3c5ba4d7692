"""The posterior of a ticket's surviving weights by Hamiltonian Monte Carlo, as the truth that others approximate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyro_lottery import masks, seeds
from pyro_lottery.data import Split
from pyro_lottery.errors import UserError, check_counts, one_line
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.modes import evaluating
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Posterior

MOST = 20_000
"""Weights above which NUTS is refused: a trajectory of many passes over all data for every draw."""


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of NUTS, and how well its chains agree in what the network predicts."""

    weights: Tensor
    """Surviving weights [chains, draws, weights], site by site in the network's order."""
    probs: Tensor
    """E[y | x, w] of every draw [chains, draws, n, ...]; class probabilities for a classifier."""
    rhat: Tensor
    """Split R-hat of each prediction [n, ...] (Gelman et al. 2013): 1 where chains agree."""
    ess: Tensor
    """Effective draws of each prediction [n, ...], over all chains."""
    divergences: int
    """Trajectories after warm-up that diverged; more than a few mean that the draws are not to be trusted."""

    @property
    def mean(self) -> Tensor:
        """E[y | x] [n, ...], averaged over all draws."""
        return self.probs.mean((0, 1))


class Target:
    """−log p(w)·p(D | w)^(1/T) of the survivors of ``mask``, as a function of one vector; everything else of the network is fixed.

    The network is in eval mode, so that BatchNorm has the running statistics that the level was trained to.
    """

    def __init__(self, model: BayesianNetwork, posterior: Posterior, mask: Mask, split: Split):
        self.model, self.mask, self.shapes = model, mask, {name: loc.shape for name, loc in posterior.loc.items()}
        kept = {
            name: mask[name] if name in mask else torch.ones(shape, dtype=torch.bool)
            for name, shape in self.shapes.items()
        }
        self.places = {name: m.flatten().nonzero().squeeze(1) for name, m in kept.items()}
        self.priors: dict[str, Any] = {name: model.prior_of(name) for name in self.shapes}
        self.x, self.y = split[:], split.targets
        with torch.no_grad(), evaluating(model):
            output = self.outputs(masks.apply(mask, posterior).loc, self.x)
            self.y = model.checked_targets(self.y, model.checked_likelihood(output, len(output)), output)

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """The survivors of ``values`` [weights]."""
        return torch.cat([values[name].flatten()[place] for name, place in self.places.items()])

    def values(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights by site, of the sites' shapes, that a vector [weights] stands for."""
        parts = flat.split([len(place) for place in self.places.values()])
        return {
            name: flat.new_zeros(shape.numel()).index_copy(0, self.places[name], part).view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def outputs(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's outputs [n, ...] with ``values`` as weights."""
        with self.model.with_weights(values, self.mask):
            return self.model.outputs(x)

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The potential energy, in nats."""
        values = self.values(parameters["w"])
        fit = self.model.likelihood(self.outputs(values, self.x)).log_prob(self.y).sum()
        prior = sum(
            self.priors[name].log_prob(value).expand(value.shape).flatten()[self.places[name]].sum()
            for name, value in values.items()
        )
        return -(fit / self.model.kl_temperature + prior)


def nuts(
    model: BayesianNetwork, posterior: Posterior, mask: Mask, train: Split, x: Tensor | Split, *, draws: int = 200, warmup: int = 200,
    chains: int = 4, seed: int = 0, max_tree_depth: int = 8,
) -> Chains:  # fmt: skip
    """Sample p(w)·p(D | w)^(1/T) over the survivors of ``mask`` by NUTS (Hoffman and Gelman 2014), and predict ``x`` [n, ...] with each draw.

    Chains start at draws of N(loc, scale²) of ``posterior`` with an adapted diagonal mass matrix. All of ``train`` is one batch; ``x`` may be a split. Raises
    ``UserError`` for fewer than two chains or four draws, for more than ``MOST`` weights, and for an ``x`` that the network cannot take.
    """
    check_counts(1, draws=draws, chains=chains, max_tree_depth=max_tree_depth)
    check_counts(0, warmup=warmup)
    if chains < 2 or draws < 4:
        raise UserError(
            f"nuts needs at least two chains of four draws to say whether they agree, got {chains} of {draws}"
        )
    target = Target(model, posterior, mask, train)
    center = masks.apply(mask, posterior)
    loc = target.flat(center.loc)
    if len(loc) > MOST:
        raise UserError(
            f"nuts over {len(loc):,} weights would take days; use a ticket of at most {MOST:,}, or another posterior"
        )
    x = x[:] if isinstance(x, Split) else x
    if not len(x):
        raise UserError("nuts needs inputs to predict, got none")
    try:  # before hours of sampling
        with evaluating(model):
            _predictions(target, [loc], x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"the network cannot take inputs {tuple(x.shape)} of {x.dtype} ({one_line(error)}); give a split, or normalised inputs"
        ) from error
    scale = torch.zeros_like(loc) if center.scale is None else target.flat(center.scale)
    found, probs, divergences = [], [], 0
    with TURN, evaluating(model), pyro.validation_enabled(False):
        for chain in range(chains):
            with seeds.rng("cpu", seed, "nuts", chain):
                start = loc + scale * torch.randn_like(loc)
                kernel = NUTS(potential_fn=target, max_tree_depth=max_tree_depth)
                sampler = MCMC(kernel, draws, warmup_steps=warmup, initial_params={"w": start}, disable_progbar=True)
                sampler.run()
            found.append(sampler.get_samples()["w"])
            divergences += sum(len(places) for places in sampler.diagnostics()["divergences"].values())
            probs.append(_predictions(target, found[-1], x))
    together = torch.stack(probs)
    flat = together.flatten(2)
    shape = together.shape[2:]
    return Chains(
        torch.stack(found),
        together,
        split_gelman_rubin(flat, 0, 1).view(shape),
        effective_sample_size(flat, 0, 1).view(shape),
        divergences,
    )


@torch.no_grad()
def _predictions(target: Target, weights: Sequence[Tensor] | Tensor, x: Tensor) -> Tensor:
    return torch.stack([target.model.expected(target.outputs(target.values(w), x)) for w in weights])
