"""What a user made in Python, where a config can only name what the library knows: a network, data, distributions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import nn

from pyro_lottery import files, guides, seeds
from pyro_lottery.data import OWN, Data
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.model import BayesianClassifier, BayesianNetwork
from pyro_lottery.model.regression import BayesianRegressor
from pyro_lottery.modes import evaluating
from pyro_lottery.priors import AnyPrior
from pyro_lottery.scores import Score
from pyro_lottery.threads import TURN

Likelihood = Callable[..., BayesianNetwork]
"""Called as ``likelihood(net, prior, num_data=N, kl_temperature=T)``: :class:`BayesianClassifier`, say, or a subclass of
:class:`BayesianNetwork` of one's own."""


@dataclass(frozen=True, eq=False)
class Own:
    """The objects that a run of :func:`pyro_lottery.find_tickets` is made from; None stands for what the config names."""

    network: nn.Module
    data: Data
    likelihood: Likelihood | None = None
    prior: AnyPrior | None = None
    guide: Callable[..., Any] | None = None
    score: Score | None = None

    def model(self, config_prior: AnyPrior, kl_temperature: float) -> BayesianNetwork:
        """A Bayesian network around a copy of the user's, which stays as it is."""
        likelihood = self.likelihood or self._usual_likelihood()
        prior = config_prior if self.prior is None else self.prior
        given = {"num_data": len(self.data.train), "kl_temperature": kl_temperature}
        _check_takes(likelihood, self.network, prior, **given)
        model = likelihood(_copy(self.network), prior, **given)
        if not isinstance(model, BayesianNetwork):
            raise UserError(
                f"likelihood gave a {type(model).__name__}; expected a BayesianNetwork, as pl.BayesianClassifier makes one of "
                "(net, prior, num_data=..., kl_temperature=...)"
            )
        return model

    def _usual_likelihood(self) -> Likelihood:
        if self.data.num_classes is None:
            return partial(BayesianRegressor, noise_scale="learned")
        return BayesianClassifier

    def drawn_anew(self) -> Own:
        """The same with the network's parameters drawn anew, by the ``reset_parameters`` of each of its modules.

        Raises ``UserError`` for a module with parameters and without such a method.
        """
        network = _copy(self.network)
        for name, module in network.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise UserError(
                    f"{name or 'the network'} is a {type(module).__name__} with parameters and without reset_parameters(), so "
                    "that its values cannot be drawn anew; give it that method"
                )
        return replace(self, network=network)


def _copy(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except (
        TypeError,
        RuntimeError,
        AttributeError,
        copy.Error,
    ) as error:  # files, locks; results kept with their graph
        raise UserError(
            f"the network cannot be copied by copy.deepcopy ({one_line(error)}); give one that keeps no open files and no results of "
            "an earlier pass"
        ) from error


def _check_takes(likelihood: Any, *given: Any, **named: Any) -> None:
    """Raise ``UserError`` unless ``likelihood`` can be called so."""
    how = "it is called as likelihood(net, prior, num_data=..., kl_temperature=...); fix what else it needs by functools.partial"
    if not callable(likelihood):
        raise UserError(f"likelihood is {likelihood!r}; {how}")
    try:
        inspect.signature(likelihood).bind(*given, **named)
    except TypeError as error:
        raise UserError(
            f"likelihood {name_of(likelihood).removeprefix(f'{OWN}-')}: {one_line(error)}; {how}"
        ) from error
    except ValueError:  # of a callable that does not tell its parameters
        return


def name_of(thing: Any) -> str:
    """How ``config.json`` names an object that no import path stands for.

    >>> name_of(nn.Linear(1, 1)), name_of(nn.Linear)
    ('own-Linear', 'own-Linear')
    """
    named = getattr(thing, "func", thing)  # of functools.partial
    name = getattr(named, "__name__", None) or type(named).__name__
    return f"{OWN}-{''.join(c for c in name if c.isalnum() or c == '_')}"


def fingerprint(model: BayesianNetwork, guide: Any, data: Data, score: Score | None = None) -> dict[str, float]:
    """What a resumed run knows its network, likelihood, prior and guide by, at their initial values.

    A checksum of the values; log p(w) + log p(two targets | w), in which the network's code, likelihood and prior have
    their part; the sum of log-scales; and of a score of the user's own the sum of its finite values.
    """
    initial, (x, y) = model.initial_values(), data.train.head()
    with TURN, evaluating(model), torch.no_grad(), poutine.block():
        conditioned: Any = poutine.condition(model, dict(initial))
        log_joint = poutine.trace(conditioned).get_trace(x, y).log_prob_sum()
    scale = guides.posterior(guide).scale or {}
    state = {f"loc/{n}": t.cpu() for n, t in initial.items()} | {
        f"net/{n}": t.cpu() for n, t in model.net_state().items()
    }
    found = {
        "initial_values": files.checksum(state),
        "log_joint": float(log_joint),
        "log_scales": sum(float(t.double().log().sum()) for t in scale.values()),
    }
    if score is not None:
        with TURN, torch.no_grad(), seeds.stream("cpu", 0, "score"):
            values = score(guides.posterior(guide))
        tensors = values.values() if isinstance(values, dict) else ()  # anything else is told when a mask is shrunk
        found["score"] = sum(
            float(t.double().nan_to_num(0, 0, 0).sum()) for t in tensors if isinstance(t, torch.Tensor)
        )
    return found
