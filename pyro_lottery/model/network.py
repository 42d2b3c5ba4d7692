"""From a plain network to a Bayesian model: priors on weights, a likelihood, N and the KL temperature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import pyro_method, to_pyro_module_
from torch import Tensor, nn

from pyro_lottery import guides, trees
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import not_hidden
from pyro_lottery.handlers.used_weights import mask_what_is_used_
from pyro_lottery.model.layers import (
    LAYERS,
    kaiming_scale,
    prunable_sites,
    random_parameters,
    random_sites,
    second_names,
    what_density_is_of,
)
from pyro_lottery.model.likelihoods import checked_targets, elementary, mean_of
from pyro_lottery.names import LIKELIHOOD, check_finite, check_same
from pyro_lottery.own_parameters import keep_parameters_
from pyro_lottery.priors import AnyPrior, OneSite, Prior, SitePrior, detached, normal, of_sites
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Sites, Ticket


def bayesianize_(net: nn.Module, priors: Mapping[str, Prior]) -> dict[str, float]:
    """Turn every parameter that ``priors`` names into a Pyro sample site, in place.

    The site is named as the parameter was, and the value it had is kept beside it as the buffer ``NAME_init`` (not in
    the state dict), where a guide finds its initial loc. Returns the Kaiming scale of every site.
    """
    found = [(site, layer, name) for site, layer, name in random_parameters(net) if site in priors]
    scales = {site: kaiming_scale(layer, name) for site, layer, name in found}
    values = {site: getattr(layer, name).detach().clone() for site, layer, name in found}
    own = _site_priors(priors, values)  # before any change
    for site, layer, name in found:
        if name == "weight" and isinstance(layer, LAYERS):
            mask_what_is_used_(layer, name, site)
    to_pyro_module_(net)
    for path, module in net.named_modules():  # of a module in two places, Pyro would name the site by the last
        if isinstance(module, PyroModule):
            module._pyro_name = path
    keep_parameters_(net)
    for site, layer, name in found:
        value = values[site]
        setattr(layer, f"{name}_prior", own[site])
        setattr(layer, name, PyroSample(_PriorOf(name)))
        layer.register_buffer(f"{name}_init", value, persistent=False)
    return scales


def _site_priors(said: Mapping[str, Prior], values: Sites) -> dict[str, SitePrior]:
    """Every site's prior, on the site's device and in its precision."""
    with TURN, poutine.block(), OneSite(check=True):  # which draws hyperpriors once, to see what depends on them
        found = {
            site: SitePrior(site, said[site], value.shape).to(value.device, value.dtype)
            for site, value in values.items()
        }
    for site, own in found.items():
        for name in {*values, "y", "data"} & {*own.hyper_sites}:
            raise UserError(
                f"the prior of {site!r} samples {name!r}, which is another site's name; choose one of its own"
            )
    return found


_with_gradients: ContextVar[bool] = ContextVar("_with_gradients", default=False)
"""Whether the model that runs here was called with gradients on."""


def _check_gradients(layer: Any, name: str) -> None:
    """Raise ``UserError`` where a network that is trained uses a weight without its gradient."""
    if torch._C._current_graph_task_id() != -1:  # as torch.utils.checkpoint asks whether a backward pass is running
        raise UserError(
            f"gradient checkpointing runs {layer._pyro_get_fullname(name)!r} again in the backward pass, where its weights "
            "would be drawn anew; switch it off"
        )
    if _with_gradients.get() and not torch.is_grad_enabled():
        raise UserError(
            f"{layer._pyro_get_fullname(name)!r} is used where gradients are off (reentrant gradient checkpointing, or "
            "torch.no_grad), so the data could not train it; switch that off, or leave the layer deterministic"
        )


class _PriorOf:
    """Reads a layer's prior when its weight is sampled (a class, not a lambda, so that models can be copied and pickled)."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, layer: Any) -> dist.TorchDistribution:
        _check_gradients(layer, self.name)
        return getattr(layer, f"{self.name}_prior")()


@pyro_method
def _sample_sites(net: Any, sites: dict[str, tuple[str, str]]) -> None:
    for path, name in sites.values():
        getattr(net.get_submodule(path) if path else net, name)


class BayesianNetwork(nn.Module):
    """A network with a prior on its weights and a likelihood: p(w)^T · p(D | w).

    ``net`` is made Bayesian in place. A batch is scaled up to ``num_data`` (N) examples by Pyro's plate; the prior
    enters with the power ``kl_temperature`` (T of paper §3), and guides built by :mod:`pyro_lottery.guides` with it
    too, so that the ELBO is E_q[log p(D|w)] − T·KL(q‖p), whose optimum is p(w)·p(D|w)^(1/T) up to a constant. What
    samples the model itself, as NUTS does, meets p(w)^T·p(D|w). Subclasses say the likelihood.
    """

    task: Literal["regression", "classification"] = "regression"
    """Classification where outputs are logits of classes and targets are labels; anything else counts as regression."""

    def __init__(self, net: nn.Module, prior: AnyPrior | None = None, *, num_data: int, kl_temperature: float = 1.0):
        super().__init__()
        self.num_data = num_data
        priors = random_sites(net, normal(0.0, 1.0) if prior is None else prior)
        self.prunable = tuple(site for site in prunable_sites(net) if site in priors)
        self._could_be_random = tuple(site for site, _, _ in random_parameters(net))
        note = what_density_is_of(net, self.prunable)
        self._net_names = set(net.state_dict()) - set(priors) - set(second_names(net))
        self.kaiming_scale = bayesianize_(net, priors)
        if note:
            warnings.warn(note, stacklevel=3)
        self.net = net
        self.kl_temperature = kl_temperature
        self._sites = {site: (site.rpartition(".")[0], site.rpartition(".")[2]) for site in self.kaiming_scale}
        self._note_hyper_sites()

    @property
    def num_data(self) -> int:
        """N, the number of training examples that a batch stands for; it may be changed, to go on with other data."""
        return self._num_data

    @num_data.setter
    def num_data(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not value >= 1:
            raise UserError(f"num_data must be a whole number of examples, at least 1, got {value!r}")
        self._num_data = int(value)

    @property
    def kl_temperature(self) -> float:
        """T, by which the log-density of the prior is multiplied; it may be changed at any time, and the guide follows."""
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
        """The sites that priors sample themselves (hyperpriors), each once."""
        return self._hyper_sites

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all random weights and biases, in the network's order."""
        return tuple(self._sites)

    def prior_of(self, site: str) -> dist.TorchDistribution:
        """The prior of each weight of ``site``, as it is now: a distribution that broadcasts to the site's shape.

        Raises ``UserError`` for a prior that depends on other sites (a hyperprior).
        """
        prior = self._priors()[site]
        if prior.hyper_sites:
            raise UserError(
                f"the prior of {site!r} depends on {', '.join(prior.hyper_sites)}; it is not one distribution"
            )
        return detached(prior.distribution)

    def set_prior_(self, prior: AnyPrior) -> None:
        """Replace the prior of every random weight, in place; the guide stays as it is, and so does what is random.

        ``priors.from_posterior`` makes one of a posterior, to go on with other data (set ``num_data`` to their number).
        An optimizer that is to learn a parameter of the new prior has to be built after this.
        """
        said = of_sites(prior, self._could_be_random)
        for site, own in said.items():
            is_random = site in self._sites
            frozen = not is_random and not self.net.get_parameter(site).requires_grad
            if isinstance(prior, Mapping) and (own is not None) != is_random and not frozen:
                raise UserError(
                    f"{site!r} is {'random' if is_random else 'deterministic'} in this model, and the new prior says "
                    f"{'None' if is_random else 'otherwise'}; build a new model to change that"
                )
        new = {site: own for site, own in said.items() if own is not None and site in self._sites}
        for site, own in _site_priors(new, self.initial_values()).items():  # all of them, before any is replaced
            path, _, name = f"{site}_prior".rpartition(".")
            self.net.get_submodule(path)._modules[name] = own
        self._note_hyper_sites()

    def _note_hyper_sites(self) -> None:
        """Keep which sites the priors sample, since every step asks."""
        self._hyper_sites = tuple(
            dict.fromkeys(name for prior in self._priors().values() for name in prior.hyper_sites)
        )

    def _priors(self) -> dict[str, SitePrior]:
        return {site: self.net.get_submodule(f"{site}_prior") for site in self._sites}  # type: ignore[misc]

    def _hyperpriors(self) -> Any:
        return OneSite(self._hyper_sites) if self._hyper_sites else nullcontext()

    def prior_parameters(self) -> list[nn.Parameter]:
        """What is learned of the priors, each once."""
        return list(dict.fromkeys(p for prior in self._priors().values() for p in prior.parameters()))

    def initial_values(self) -> Sites:
        """What every site was when the network was made Bayesian: the starting loc of a guide."""
        return {
            site: (self.net.get_submodule(path) if path else self.net).get_buffer(f"{name}_init")
            for site, (path, name) in self._sites.items()
        }

    def likelihood_parameters(self) -> dict[str, nn.Parameter]:
        """What is learned and belongs neither to the network nor to its prior (a noise scale, say), by its name."""
        found = {name: p for name, p in self._parameters.items() if p is not None}
        for child, module in self._modules.items():
            if module is not None and module is not self.net:
                found |= {f"{child}.{name}": p for name, p in module.named_parameters()}
        networks = {id(p) for p in self.net.parameters()} if found else set()
        return {name: p for name, p in found.items() if id(p) not in networks}

    def net_state(self) -> Sites:
        """Copies of what is not random: normalisation parameters and buffers, under the plain network's names,
        parameters of priors that are learned, under ``SITE_prior``, and what the model has beside its network,
        ``likelihood/NAME``.
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
        """Copy :meth:`net_state` back, bit for bit; a missing, unknown or mis-shaped name raises ``UserError``."""
        own = self._state()
        check_same(state, own, prefix="net/")
        check_finite(state, own, "net/")
        for name, value in own.items():
            value.copy_(state[name])

    def start_from_(self, guide: AutoGuide, ticket: Ticket) -> Mask:
        """Put a ticket into this network and its guide; returns the mask, for :func:`pyro_lottery.handlers.sparsify`.

        Raises one ``UserError`` with the names that differ where the ticket is of another architecture.
        """
        guides.check_guide(guide)
        guides.check_sites(self, guide)
        loc = guides.locs(guide)
        own = {"loc": loc, "net": self.net_state(), "mask": {name: loc[name] for name in self.prunable}}
        given = {"loc": ticket.start.loc, "net": ticket.net, "mask": ticket.mask}
        check_same(_by_group(given), _by_group(own), "the ticket is of another network: ")
        for name, value in (*ticket.start.loc.items(), *(ticket.start.scale or {}).items()):
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise UserError(f"the ticket's {name} holds {value.dtype} values that are not all finite real numbers")
        guides.set_posterior_(guide, ticket.start)
        self.load_net_state(ticket.net)
        return ticket.mask

    def outputs(self, x: Any) -> Tensor:
        """What the network gives for a batch, in float32, or float64 if its weights are; ``UserError`` if it is no tensor of
        as many examples.

        A network of several inputs takes a tuple or list of tensors as ``net(*x)``, and a mapping as ``net(**x)``.
        """
        path, name = next(iter(self._sites.values()))
        dtype = getattr(self.net.get_submodule(path), f"{name}_init").dtype
        # images are float32, and arrays of numpy float64
        x = trees.map_tensors(
            lambda t: t.to(dtype) if t.is_floating_point() and torch.float64 in (t.dtype, dtype) else t, x
        )
        count = trees.count(x)
        if isinstance(x, Mapping):
            output = one_tensor(self.net(**x))
        else:
            output = one_tensor(self.net(*x) if isinstance(x, tuple | list) else self.net(x))
        if output.shape[:1] != (count,):  # which would show only where slices are joined, if at all
            raise UserError(
                f"the network gave {tuple(output.shape)} for {count} example{'s' * (count != 1)}, where the first dimension must "
                "be the examples; does it squeeze() without a dimension, or reshape them?"
            )
        return output

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        """The distribution of one target per example given the network's output: of batch shape [n]."""
        raise UserError(
            f"{type(self).__name__} has no likelihood; give the class a method likelihood(self, output) that returns a "
            "distribution, or take pl.BayesianClassifier or pl.BayesianRegressor"
        )

    def expected(self, output: Tensor) -> Tensor:
        """E[y] given the network's output: [n, ...]; of a classifier the classes' probabilities [n, classes]. NaN where the
        likelihood has no mean.
        """
        return mean_of(self.checked_likelihood(output, len(output)), output)

    def tally(self, output: Tensor, targets: Tensor) -> Tensor:
        """What training sums over a batch to tell how good predictions are, as a scalar.

        For a classifier the number of right predictions; for others the sum over examples of the squared error of the
        likelihood's mean, averaged over a target's elements: NaN where the likelihood has no mean.
        """
        error = self.expected(output) - targets.to(output.dtype)
        return error.square().reshape(len(error), -1).mean(1).sum()

    def forward(self, x: Any = None, y: Tensor | None = None) -> Tensor | None:
        """The Pyro model: sample the weights, run the network on ``x``, observe ``y``; returns the network's output.

        Without ``x`` the weights alone are sampled, without a forward pass: so a guide learns the sites before the
        first batch, and BatchNorm does not notice.
        """
        entered = _with_gradients.set(torch.is_grad_enabled())
        try:
            with not_hidden(), poutine.scale(scale=self.kl_temperature), self._hyperpriors():
                if x is None:
                    _sample_sites(self.net, self._sites)
                    return None
                drawn: Any = self.net._pyro_context  # what was met of it within this call
                with drawn:
                    output = self.outputs(x)
                    unused = [place for site, place in self._sites.items() if drawn.get(site) is None]
                    for path, name in unused:  # or their KL would lack the prior
                        getattr(self.net.get_submodule(path), name)
                    for name, parameter in self.likelihood_parameters().items():
                        if parameter.requires_grad:  # said, so that pyro.infer.SVI trains it too
                            pyro.param(f"likelihood.{name}", parameter)
        finally:
            _with_gradients.reset(entered)
        # given, or the plate would draw its own: a permutation of N
        index = torch.arange(trees.count(x), device=trees.first_tensor(x).device)
        likelihood = self.checked_likelihood(output, len(index))
        if y is not None:
            if len(index) > self.num_data:
                raise UserError(
                    f"a batch of {len(index)} examples, but num_data is {self.num_data}; give the model the number of "
                    "training examples"
                )
            y = self.checked_targets(y, likelihood, output)
        with pyro.plate("data", self.num_data, subsample=index):
            pyro.sample("y", likelihood, obs=y)
        return output

    def checked_likelihood(self, output: Tensor, count: int) -> Any:
        """:meth:`likelihood` of ``count`` examples; ``UserError`` unless it is one distribution for each of them."""
        found: Any = self.likelihood(output)
        if not isinstance(found, TorchDistributionMixin):
            raise UserError(
                f"likelihood() must return a distribution of pyro.distributions, got a {type(found).__name__} of "
                f"{type(found).__module__}"
            )
        if len(found.batch_shape) > 1:  # Pyro's plate would take each element for an example
            elements = len(found.batch_shape) - 1
            raise UserError(
                f"likelihood() has the batch shape {tuple(found.batch_shape)}, in which every element counts as an "
                f"example of its own; end it in .to_event({elements})"
            )
        if tuple(found.batch_shape) != (count,):  # which the plate would repeat for every example
            raise UserError(
                f"likelihood() has the batch shape {tuple(found.batch_shape)} for {count} examples whose outputs are "
                f"{tuple(output.shape)}; it must be ({count},), one distribution for each example"
            )
        return found

    def checked_targets(self, y: Tensor, likelihood: Any, output: Tensor) -> Tensor:
        """Targets as ``likelihood`` takes them; ``UserError`` for those of another shape or kind."""
        return checked_targets(y, likelihood, output.dtype)


def one_tensor(output: Any) -> Tensor:
    """A network's output, at least in float32; ``UserError`` that says what a network returned that is no tensor."""
    if not isinstance(output, Tensor):
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
        inside = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
        raise UserError(
            f"the network returned a {type(output).__name__}{f' of {inside}' if inside else ''}; it must return one tensor "
            "(switch auxiliary outputs off by aux_logits=False, or wrap the network in a module that returns its logits)"
        )
    return output if output.dtype == torch.float64 else output.float()


def _by_group(groups: Mapping[str, Sites]) -> Sites:
    return {f"{group}/{name}": value for group, sites in groups.items() for name, value in sites.items()}


class BayesianClassifier(BayesianNetwork):
    """A :class:`BayesianNetwork` whose outputs are logits of a categorical likelihood."""

    task = "classification"

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=_logits(output))

    def checked_targets(self, y: Tensor, likelihood: Any, output: Tensor) -> Tensor:
        if isinstance(y, Tensor) and y.shape == output.shape:
            raise UserError(f"labels are {tuple(y.shape)}, one-hot or probabilities; give y.argmax(1), of ({len(y)},)")
        return super().checked_targets(y, likelihood, output)

    def expected(self, output: Tensor) -> Tensor:
        if type(self).likelihood is BayesianClassifier.likelihood:
            return _logits(output).softmax(-1)
        return elementary(self.likelihood(output)).probs

    def tally(self, output: Tensor, targets: Tensor) -> Tensor:
        found = output if type(self).likelihood is BayesianClassifier.likelihood else self.expected(output)
        return (found.argmax(-1) == targets.long()).sum()


def _logits(output: Tensor) -> Tensor:
    if output.ndim != 2 or output.shape[1] < 2:
        raise UserError(
            f"a classifier's outputs must be logits [n, classes] of at least two classes, got {tuple(output.shape)}; "
            "for other targets (one logit, several labels, one class per pixel) subclass pl.BayesianNetwork"
        )
    return output
