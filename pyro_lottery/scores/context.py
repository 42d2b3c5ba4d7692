"""What a score may see beside the posterior: the prior, the network, the training data and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_lottery import masks, seeds
from pyro_lottery.data import Split, Stream, batch, shuffle
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.model.fixed import bare, with_weights
from pyro_lottery.model.outputs import call
from pyro_lottery.types import Mask, Ticket


@dataclass(frozen=True, eq=False)
class Context:
    """What a score may see beside the posterior, on the CPU. Nothing of it depends on what the process did before."""

    model: BayesianNetwork
    """The network with its prior and likelihood, as it was trained."""
    data: Split | Stream
    """The training data."""
    mask: Mask
    """The mask of the level that was trained, whose survivors are ranked."""
    dense: Ticket
    """All weights and the other tensors at the start of level 0."""
    seed: int
    level: int
    """The level that is to be trained, or is being trained under a mask that moves."""
    step: int = 0
    """The finished steps of a training under a mask that moves."""
    weight_decay: float = 0.0
    """The weight decay λ if the posterior is that under p(w) exp(−Nλw²/2T), as of ``laplace`` and Langevin samples; 0 for other posteriors."""

    @cached_property
    def network(self) -> BayesianNetwork:
        """The network with its likelihood on the CPU, whose tensors that are not random are those at the start of level 0."""
        model = copy.deepcopy(self.model).cpu()
        model.load_net_state(self.dense.net)
        return model

    @cached_property
    def _trained(self) -> BayesianNetwork:
        """The network as it was trained, whose prior may have been learned, on the CPU."""
        on_cpu = all(p.device.type == "cpu" for p in self.model.parameters())
        return self.model if on_cpu else copy.deepcopy(self.model).cpu()

    def prior(self, site: str) -> Any:
        """The prior of a site, with the site's shape; that of the trained network if the prior is learned."""
        found = self._trained.prior_of(site)
        return found.expand(self.dense.start.loc[site].shape) if found.event_shape == () else found

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters that are not random, such as gains of norms and deterministic layers."""
        return frozenset(name.removeprefix("net.") for name, _ in self.model.named_parameters()) & self.dense.net.keys()

    def with_net(self, change: Callable[[str, Tensor], Tensor]) -> Context:
        """This context with ``change`` of the name and value of every tensor that is not random, of the same shape."""
        net = {name: change(name, value) for name, value in self.dense.net.items()}
        return replace(self, dense=replace(self.dense, net=net))

    def batches(self, count: int = 1, size: int = 128) -> Iterator[tuple[Any, Tensor]]:
        """The first ``count`` batches of inputs [b, ...] and targets [b, ...], without augmentation, in an order by ``seed``, ``level`` and ``step``.

        ``size`` is that of batches from memory; a loader has its own.
        """
        path: tuple[str | int, ...] = ("score data", self.level, *([self.step] if self.step else []))
        if isinstance(self.data, Stream):
            yield from self.data.to(torch.device("cpu")).some(count, self.seed, *path)
            return
        generator = seeds.generator("cpu", self.seed, *path)
        for indices in shuffle(len(self.data), min(size, len(self.data)), generator)[:count]:
            x, y = batch(self.data, indices.to(self.data.device), "none", generator)
            yield x.cpu(), y.cpu()

    def initial(self) -> dict[str, Tensor]:
        """The initial locs, of the sites' shapes, 0 where the mask prunes; gradients can be asked for them."""
        loc = masks.apply(self.mask, self.dense.start).loc
        return {site: value.detach().clone().requires_grad_() for site, value in loc.items()}

    def outputs(self, values: Mapping[str, Tensor], x: Any, training: bool = False) -> Tensor:
        """The network's outputs [b, ...] for inputs ``x`` [b, ...] with ``values`` as weights; other tensors are as at the start of level 0.

        In the type of the values, and with the statistics of the batch if ``training``.
        """
        dtype = next(iter(values.values())).dtype
        net = bare(self.network.net, self.network.sites, self.mask).to(dtype).train(training)
        with with_weights(net, values):
            return call(net, x, dtype)

    def loss(self, values: Mapping[str, Tensor], examples: tuple[Any, Tensor]) -> Tensor:
        """The mean negative log-likelihood, a scalar, of a batch of ``examples`` with ``values`` as weights, in training."""
        x, y = examples
        output = self.outputs(values, x, training=True)
        likelihood = self.network.checked_likelihood(output, len(output))
        return -likelihood.log_prob(self.network.checked_targets(y, likelihood, output)).mean()
