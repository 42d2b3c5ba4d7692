"""A network as a Bayesian model: priors on weights, a likelihood, N and the KL temperature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery import guides, trees
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import not_hidden
from pyro_lottery.model.bayesianize import bayesianize_, sample_sites, site_priors, with_gradients
from pyro_lottery.model.fixed import with_weights
from pyro_lottery.model.layers import (
    prunable_sites,
    random_parameters,
    random_sites,
    second_names,
    what_density_is_of,
)
from pyro_lottery.model.likelihoods import checked_targets, moment, one_per_example
from pyro_lottery.model.outputs import call
from pyro_lottery.names import LIKELIHOOD, check_finite, check_same, joined
from pyro_lottery.priors import AnyPrior, OneSite, SitePrior, detached, normal, of_sites
from pyro_lottery.types import Mask, Sites, Ticket


class BayesianNetwork(nn.Module):
    """A network with a prior on its weights and a likelihood: the Pyro model p(w)^T · p(D | w).

    ``net`` is made Bayesian in place. ``prior`` is N(0, 1) by default, and of any kind that ``pl.priors`` describes.
    Pyro's plate scales a batch up to ``num_data`` (N) examples. The prior, and each guide built by ``pl.guides``, enters
    with the power ``kl_temperature`` (T of paper §3). The ELBO is therefore E_q[log p(D|w)] − T·KL(q‖p), and its optimum
    is proportional to p(w)·p(D|w)^(1/T). Methods that sample the model directly, such as NUTS, target p(w)^T·p(D|w).

    A subclass defines ``likelihood(output)``. Raises ``UserError`` if the network has no layer that can be random or is
    already Bayesian, if a prior does not fit, and if ``num_data`` or ``kl_temperature`` is out of range.
    """

    task: Literal["regression", "classification"] = "regression"
    """``"classification"`` if outputs are logits and targets are labels; ``"regression"`` for everything else."""

    def __init__(self, net: nn.Module, prior: AnyPrior | None = None, *, num_data: int, kl_temperature: float = 1.0):
        super().__init__()
        self.num_data, self.kl_temperature = num_data, kl_temperature
        priors = random_sites(net, normal(0.0, 1.0) if prior is None else prior)
        self.prunable = tuple(site for site in prunable_sites(net) if site in priors)
        self._could_be_random = tuple(site for site, _, _ in random_parameters(net))
        note = what_density_is_of(net, self.prunable)
        self._net_names = set(net.state_dict()) - set(priors) - set(second_names(net))
        self.kaiming_scale = bayesianize_(net, priors)
        if note:
            warnings.warn(note, stacklevel=3)
        self.net = net
        self._sites = {site: (site.rpartition(".")[0], site.rpartition(".")[2]) for site in self.kaiming_scale}
        self._note_hyper_sites()

    @property
    def num_data(self) -> int:
        """N, the number of training examples that a batch represents; it can be set, to continue with other data."""
        return self._num_data

    @num_data.setter
    def num_data(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not value >= 1:
            raise UserError(f"num_data must be a whole number of examples, at least 1, got {value!r}")
        self._num_data = int(value)

    @property
    def kl_temperature(self) -> float:
        """T, the factor of the prior's log density; it can be set at any time, and applies to the guide too."""
        return self._kl_temperature

    @kl_temperature.setter
    def kl_temperature(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise UserError(f"kl_temperature must be greater than 0 and finite, got {value}")
        self._kl_temperature = value

    @property
    def independent_sites(self) -> tuple[str, ...]:
        """The sites whose prior depends on no other site."""
        return tuple(site for site, prior in self._priors().items() if not prior.hyper_sites)

    @property
    def hyper_sites(self) -> tuple[str, ...]:
        """The sites that priors sample themselves (hyperpriors), without duplicates."""
        return self._hyper_sites

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of all random weights and biases, in the network's order."""
        return tuple(self._sites)

    def prior_of(self, site: str) -> dist.TorchDistribution:
        """The current prior of each weight of ``site``: a distribution that broadcasts to the site's shape.

        Raises ``UserError`` if the prior depends on other sites (a hyperprior).
        """
        prior = self._priors()[site]
        if prior.hyper_sites:
            raise UserError(
                f"the prior of {site!r} depends on {', '.join(prior.hyper_sites)}, so no one distribution is its prior; take it from a trace of the model"
            )
        return detached(prior.distribution)

    def set_prior_(self, prior: AnyPrior) -> None:
        """Replace the prior of every random weight in place; the guide and the set of random weights do not change.

        ``priors.from_posterior`` turns a posterior into a prior, to continue with other data (set ``num_data`` to their
        number). Build the optimizer afterwards if it is to learn parameters of the new prior. Raises ``UserError`` if the
        new prior is None for a random weight, or a distribution for a deterministic one.
        """
        said = of_sites(prior, self._could_be_random)
        for site, own in said.items():
            is_random = site in self._sites
            frozen = not is_random and not self.net.get_parameter(site).requires_grad
            if isinstance(prior, Mapping) and (own is not None) != is_random and not frozen:
                raise UserError(
                    f"{site!r} is {'random' if is_random else 'deterministic'} in this model, but the new prior is "
                    f"{'None' if is_random else 'a distribution'}; build a new model to change that"
                )
        new = {site: own for site, own in said.items() if own is not None and site in self._sites}
        for site, own in site_priors(new, self.initial_values()).items():  # all are built before the first is replaced
            path, _, name = f"{site}_prior".rpartition(".")
            self.net.get_submodule(path)._modules[name] = own
        self._note_hyper_sites()

    def _note_hyper_sites(self) -> None:
        """Cache which sites the priors sample, since every step needs them."""
        self._hyper_sites = tuple(
            dict.fromkeys(name for prior in self._priors().values() for name in prior.hyper_sites)
        )

    def _priors(self) -> dict[str, SitePrior]:
        return {site: self.net.get_submodule(f"{site}_prior") for site in self._sites}  # type: ignore[misc]

    def _hyperpriors(self) -> Any:
        return OneSite(self._hyper_sites) if self._hyper_sites else nullcontext()

    def prior_ids(self) -> tuple[int, ...]:
        """What tells whether :meth:`set_prior_` replaced a prior meanwhile."""
        return tuple(id(prior) for prior in self._priors().values())

    def prior_parameters(self) -> list[nn.Parameter]:
        """The learned parameters of the priors, without duplicates."""
        return list(dict.fromkeys(p for prior in self._priors().values() for p in prior.parameters()))

    def initial_values(self) -> Sites:
        """The value of every site when the network was made Bayesian: the initial loc of a guide."""
        return {
            site: self.net.get_submodule(path).get_buffer(f"{name}_init") for site, (path, name) in self._sites.items()
        }

    def likelihood_parameters(self) -> dict[str, nn.Parameter]:
        """The learned parameters, by name, that belong neither to the network nor to its priors, such as a noise scale."""
        found = {name: p for name, p in self._parameters.items() if p is not None}
        for child, module in self._modules.items():
            if module is not None and module is not self.net:
                found |= {f"{child}.{name}": p for name, p in module.named_parameters()}
        networks = {id(p) for p in self.net.parameters()} if found else set()
        return {name: p for name, p in found.items() if id(p) not in networks}

    def net_state(self) -> Sites:
        """Copies of all tensors that are not random, by name.

        These are normalisation parameters and buffers, under the names of the plain network, learned parameters of
        priors, under ``SITE_prior``, and the model's other parameters and buffers, under ``likelihood/NAME``.
        """
        return {name: value.detach().clone() for name, value in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        names, every = self._net_names | self._learned_names(), self.state_dict()
        own = {name.removeprefix("net."): value for name, value in every.items() if name.startswith("net.")}
        found = {name: value for name, value in own.items() if name in names}
        return found | {LIKELIHOOD + name: value for name, value in every.items() if not name.startswith("net.")}

    def _learned_names(self) -> set[str]:
        return {f"{site}_prior.{name}" for site, prior in self._priors().items() for name in prior.learned_names()}

    def load_net_state(self, state: Sites) -> None:
        """Copy the tensors of ``net_state`` back, bit for bit.

        Raises ``UserError`` if a name is missing or unknown, or if a shape differs.
        """
        own = self._state()
        check_same(state, own, prefix="net/")
        check_finite(state, own, "net/")
        for name, value in own.items():
            value.copy_(state[name])

    def start_from_(self, guide: AutoGuide, ticket: Ticket) -> Mask:
        """Copy a ticket into this network and its guide; returns the mask, for ``pl.handlers.sparsify``.

        Raises ``UserError`` with all names that differ if the ticket belongs to another architecture.
        """
        guides.check_guide(guide)
        guides.check_sites(self, guide)
        loc = guides.locs(guide)
        own = {"loc": loc, "net": self.net_state(), "mask": {name: loc[name] for name in self.prunable}}
        given = {"loc": ticket.start.loc, "net": ticket.net, "mask": ticket.mask}
        check_same(joined(given), joined(own), "the ticket belongs to another network: ")
        for name, value in (*ticket.start.loc.items(), *(ticket.start.scale or {}).items()):
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise UserError(
                    f"the ticket's {name} holds {value.dtype} values that are not all finite; expected finite real numbers"
                )
        guides.set_posterior_(guide, ticket.start)
        self.load_net_state(ticket.net)
        return ticket.mask

    def sampled(self) -> Sites:
        """A value of every site as the network would use it here: under the enclosing handlers, such as conditions and masks."""
        with poutine.trace() as traced:
            self()
        nodes: Any = traced.trace.nodes
        return {site: nodes[site]["value"] for site in self._sites}

    def with_weights(self, values: Mapping[str, Tensor], mask: Mask | None = None) -> AbstractContextManager[None]:
        """A context in which the network uses ``values``, by site and of the sites' shapes, as weights without asking Pyro.

        Layers that transform their weights use those under ``mask``, or without one under an enclosing ``sparsify``.
        """
        return with_weights(self.net, {site: value for site, value in values.items() if site in self._sites}, mask)

    def outputs(self, x: Any) -> Tensor:
        """The network's output [n, ...] for a batch of n examples, in float32, or in float64 if its weights are.

        A network with several inputs is called as ``net(*x)`` for a tuple or list of tensors, and as ``net(**x)`` for a
        mapping. Raises ``UserError`` if the output is not one tensor with n examples.
        """
        path, name = next(iter(self._sites.values()))
        dtype = getattr(self.net.get_submodule(path), f"{name}_init").dtype
        return call(self.net, x, dtype)

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        """The distribution, with batch shape [n], of one target per example given the network's output [n, ...].

        Raises ``UserError`` unless a subclass defines it.
        """
        raise UserError(
            f"{type(self).__name__} has no likelihood; define a method likelihood(self, output) that returns a "
            "distribution, or use pl.BayesianClassifier or pl.BayesianRegressor"
        )

    def expected(self, output: Tensor) -> Tensor:
        """E[y] [n, ...] given the network's output; NaN if the likelihood has no mean.

        For a classifier these are the class probabilities [n, classes].
        """
        return moment(self.checked_likelihood(output, len(output)), "mean", output)

    def tally(self, output: Tensor, targets: Tensor) -> Tensor:
        """A scalar that training sums over batches to report how good predictions are.

        For a classifier it is the number of correct predictions. For other models it is the squared error of the
        likelihood's mean, averaged over a target's elements and summed over examples; NaN if the likelihood has no mean.
        """
        error = self.expected(output) - targets.to(output.dtype)
        return error.square().reshape(len(error), -1).mean(1).sum()

    def forward(self, x: Any = None, y: Tensor | None = None) -> Tensor | None:
        """The Pyro model: sample the weights, run the network on ``x`` and observe ``y``; returns the output [n, ...].

        Without ``x``, it samples the weights but does not run the network, so that a guide can find the sites before the
        first batch, and BatchNorm's statistics do not change. Raises ``UserError`` if ``y`` does not fit the likelihood.
        """
        entered = with_gradients.set(torch.is_grad_enabled())
        try:
            with not_hidden(), poutine.scale(scale=self.kl_temperature), self._hyperpriors():
                if x is None:
                    sample_sites(self.net, self._sites)
                    return None
                drawn: Any = self.net._pyro_context  # the sites that are sampled within this call
                with drawn:
                    output = self.outputs(x)
                    unused = [place for site, place in self._sites.items() if drawn.get(site) is None]
                    for path, name in unused:  # sample them, or their KL would lack the prior
                        getattr(self.net.get_submodule(path), name)
                    for name, parameter in self.likelihood_parameters().items():
                        if parameter.requires_grad:  # registered, so that pyro.infer.SVI trains it too
                            pyro.param(f"likelihood.{name}", parameter)
        finally:
            with_gradients.reset(entered)
        # otherwise the plate would draw a permutation of N
        index = torch.arange(trees.count(x), device=trees.first_tensor(x).device)
        likelihood = self.checked_likelihood(output, len(index))
        if y is not None:
            if len(index) > self.num_data:
                raise UserError(
                    f"a batch has {len(index)} examples, but num_data is {self.num_data}; set num_data to the number of "
                    "training examples"
                )
            y = self.checked_targets(y, likelihood, output)
        with pyro.plate("data", self.num_data, subsample=index):
            pyro.sample("y", likelihood, obs=y)
        return output

    def checked_likelihood(self, output: Tensor, count: int) -> Any:
        """``likelihood(output)``, with batch shape [count]; raises ``UserError`` unless it is one distribution per example."""
        return one_per_example(self.likelihood(output), output, count)

    def checked_targets(self, y: Tensor, likelihood: Any, output: Tensor) -> Tensor:
        """Targets in the dtype that ``likelihood`` needs; raises ``UserError`` if their shape or kind is wrong."""
        return checked_targets(y, likelihood, output.dtype)
