"""Objects that a user makes in Python and a config cannot name: network, data, likelihood, prior, guide and score."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import nn

from pyro_lottery import files, seeds
from pyro_lottery.data import OWN, Data
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.model import BayesianClassifier, BayesianNetwork
from pyro_lottery.model.regression import BayesianRegressor
from pyro_lottery.modes import evaluating
from pyro_lottery.names import joined
from pyro_lottery.priors import AnyPrior
from pyro_lottery.scores import Context, Score, ranks
from pyro_lottery.threads import TURN
from pyro_lottery.types import Sites, Ticket

Likelihood = Callable[..., BayesianNetwork]
"""Called as ``likelihood(net, prior, num_data=N, kl_temperature=T)``; returns a :class:`BayesianNetwork`.
:class:`BayesianClassifier` is one, as is any subclass with this signature."""


@dataclass(frozen=True, eq=False)
class Own:
    """The objects that a run of :func:`pyro_lottery.find_tickets` is made from; for None, the config's choice is used."""

    network: nn.Module
    data: Data
    likelihood: Likelihood | None = None
    prior: AnyPrior | None = None
    guide: Callable[..., Any] | None = None
    score: Score | None = None

    def model(self, config_prior: AnyPrior, kl_temperature: float) -> BayesianNetwork:
        """A Bayesian network around a copy of the user's network, which is not changed.

        Raises ``UserError`` if the network cannot be copied, or if ``likelihood`` cannot be called or returns no BayesianNetwork.
        """
        likelihood = self.likelihood or self._usual_likelihood()
        prior = config_prior if self.prior is None else self.prior
        given = {"num_data": len(self.data.train), "kl_temperature": kl_temperature}
        bound = getattr(likelihood, "keywords", {})  # of a functools.partial
        for name, value in given.items():
            if bound.get(name, value) != value:
                how = "give kl_temperature= to find_tickets" if name == "kl_temperature" else "it follows from the data"
                raise UserError(
                    f"likelihood binds {name}={bound[name]!r}, but the run has {value!r}: {how}; do not bind it"
                )
        _check_takes(likelihood, self.network, prior, **given)
        model = likelihood(_copy(self.network), prior, **given)
        if not isinstance(model, BayesianNetwork):
            raise UserError(
                f"likelihood returned a {type(model).__name__}; expected a BayesianNetwork, as from "
                "pl.BayesianClassifier(net, prior, num_data=..., kl_temperature=...)"
            )
        return model

    def _usual_likelihood(self) -> Likelihood:
        if self.data.num_classes is None:
            shape = self.data.train.head()[1].shape[1:]
            scales = (shape[0], *(1 for _ in shape[1:])) if len(shape) > 1 else None  # one for each channel
            return partial(BayesianRegressor, noise_scale="learned", outputs=scales)
        return BayesianClassifier

    def drawn_anew(self) -> Own:
        """A copy with new initial values of the network's parameters, from ``reset_parameters`` of each of its modules.

        Frozen parameters keep theirs. Warns of layers that came with values of another spread than that method draws. Raises ``UserError``
        for a module that has trainable parameters but no such method.
        """
        network = _copy(self.network)
        before = {name: (p, p.detach().clone()) for name, p in network.named_parameters()}
        for name, module in network.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif any(p.requires_grad for p in module.parameters(recurse=False)):
                raise UserError(
                    f"{name or 'the network'} is a {type(module).__name__} that has parameters but no reset_parameters(), "
                    "which must set new initial values; add that method"
                )
        with torch.no_grad():
            for parameter, value in before.values():
                if not parameter.requires_grad:
                    parameter.copy_(value)
        others = [name for name, (new, old) in before.items() if new.ndim > 1 and _spreads_differ(old, new)]
        if others:
            warnings.warn(
                f"reset_parameters() draws values of another spread than {', '.join(others[:3])} came with, so the weights of this control begin "
                "elsewhere; give their modules a reset_parameters() that initialises them as you did",
                stacklevel=2,
            )
        return replace(self, network=network)


def _spreads_differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the root mean squares of two tensors of many values differ by a factor of more than two."""
    if one.numel() < 30:  # of few values, chance decides
        return False
    a, b = (float(t.detach().double().square().mean().sqrt()) for t in (one, other))
    return not a / 2 <= b <= 2 * a


def _copy(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    # Open files and locks cannot be copied, nor tensors kept with their autograd graph.
    except (TypeError, RuntimeError, AttributeError, copy.Error) as error:
        raise UserError(
            f"copy.deepcopy cannot copy the network ({one_line(error)}); give one that keeps no open files and no tensors of "
            "an earlier pass"
        ) from error


def _check_takes(likelihood: Any, *given: Any, **named: Any) -> None:
    """Raise ``UserError`` unless ``likelihood`` can be called with these arguments."""
    how = "it is called as likelihood(net, prior, num_data=..., kl_temperature=...); bind other arguments by functools.partial"
    if not callable(likelihood):
        raise UserError(f"likelihood is {likelihood!r}; {how}")
    try:
        inspect.signature(likelihood).bind(*given, **named)
    except TypeError as error:
        raise UserError(
            f"likelihood {name_of(likelihood).removeprefix(f'{OWN}-')}: {one_line(error)}; {how}"
        ) from error
    except ValueError:  # the callable has no signature to inspect
        return


def name_of(thing: Any) -> str:
    """The name in ``config.json`` of an object made in Python.

    >>> name_of(nn.Linear(1, 1)), name_of(nn.Linear)
    ('own-Linear', 'own-Linear')
    """
    named = getattr(thing, "func", thing)  # the function of a functools.partial
    name = getattr(named, "__name__", None) or type(named).__name__
    return f"{OWN}-{''.join(c for c in name if c.isalnum() or c == '_')}"


def _options(net: nn.Module) -> Iterator[tuple[str, str, float]]:
    for path, module in net.named_modules():
        for name, value in sorted(vars(module).items()):
            if isinstance(value, float) and not name.startswith("_"):
                yield path, name, value


Fingerprint = dict[str, float | list[float]]


def fingerprint(model: BayesianNetwork, data: Data, dense: Ticket, score: Score | None = None) -> Fingerprint:
    """Numbers by which a resumed run recognises its network, likelihood, prior, guide and score, at their initial values.

    A checksum of the values; those of :func:`of_code` for two examples of the data; the sum of log-scales; and, for a ``score`` made in Python,
    the sum of its finite values.
    """
    initial = model.initial_values()
    scale = dense.start.scale or {}
    state = {name: t.cpu() for name, t in joined({"loc": initial, "net": model.net_state()}).items()}
    found: Fingerprint = {
        "initial_values": files.checksum(state),
        **of_code(model, initial, *data.train.head()),
        "log_scales": sum(float(t.double().log().sum()) for t in scale.values()),
    }
    return found if score is None else found | {"score": of_score(score, model, data, dense)}


def of_score(score: Score, model: BayesianNetwork, data: Data, dense: Ticket) -> float:
    """The sum of the finite values of a score made by the user, for the untrained network and with random numbers of its own."""
    with TURN, seeds.rng("cpu", 0, "score"):
        values = ranks(score, dense.start, Context(model, data.train, dense.mask, dense, 0, 1))
    tensors = values.values() if isinstance(values, dict) else ()  # shrinking a mask reports any other type
    return sum(float(t.detach().double().nan_to_num(0, 0, 0).sum()) for t in tensors if isinstance(t, torch.Tensor))


def of_code(model: BayesianNetwork, values: Sites, x: Any, y: torch.Tensor) -> Fingerprint:
    """Numbers that depend on the code of a network, its likelihood and its prior, for ``values`` [of each site's shape] as weights w and a batch x, y.

    A checksum of the modules' real options, such as dropout rates, which only act in training; log p(w) of each site; and
    log p(w) + log p(y | w). What is not finite counts as 0.
    """
    with TURN, evaluating(model), torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        conditioned: Any = poutine.condition(model, dict(values))
        trace = poutine.trace(conditioned).get_trace(x, y)
        log_joint = trace.log_prob_sum()
    nodes: Any = trace.nodes
    return {
        "options": files.checksum({}, str(list(_options(model.net)))),
        "log_prior": [_finite(nodes[site]["log_prob_sum"]) for site in values],
        "log_joint": _finite(log_joint),
    }


def _finite(value: Any) -> float:
    return float(value) if math.isfinite(value) else 0.0
