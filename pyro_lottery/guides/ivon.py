"""The improved variational online Newton method: a mean-field guide that is trained by natural gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import model_of
from pyro_lottery.guides.mean_field import MeanField

RATE = 100.0
"""Learning rate of loc per learning rate of Adam: the authors use 0.1 to 0.2 where Adam takes 0.001 to 0.002."""
CURVATURE = 0.5
"""The curvature h₀+λ that training begins with, for the usual ``init_scale`` of 0.01."""


class Newton(Adam):
    """IVON (Shen et al. 2024, Algorithm 1) for ``loc`` and ``log_scale``, and Adam for all other parameters.

    With the gradients g of loc and g' of log_scale, noise s = T/N and weight decay λ, the curvature of the objective is
    estimated by ĥ = (g' + s)/scale² and kept in the scale, h = s/scale² − λ. A step is

    - h ← h + (1−β₂)(ĥ−h) + ½(1−β₂)²(ĥ−h)²/(h+λ), which keeps h+λ positive,
    - m ← β₁m + (1−β₁)g, and loc ← loc − 100 ε (h₀+λ) (m/(1−β₁ᵗ) + λ·loc)/(h+λ) with Adam's learning rate ε and h₀+λ = ``CURVATURE``.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, loc: Tensor, log_scale: Tensor, beta2: float, **options: Any
    ):
        super().__init__(groups, lr, **options)
        self.loc, self.log_scale, self.beta2, self.noise = loc, log_scale, beta2, 1.0

    @property
    def _group(self) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(self.loc is p for p in group["params"]))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        gradient, of_scale = self.loc.grad, self.log_scale.grad
        assert gradient is not None
        assert of_scale is not None
        self.loc.grad = self.log_scale.grad = None  # so that Adam leaves them alone
        super().step()
        self.loc.grad, self.log_scale.grad = gradient, of_scale
        group, state = self._group, self.state[self.loc]
        if not state:  # all of Adam's, so that checkpoints and schedules know it
            for parameter in (self.loc, self.log_scale):
                own = self.state[parameter]
                own["step"] = torch.zeros((), device=parameter.device)
                own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        decay, beta1 = group["weight_decay"], group["betas"][0]
        variance = (2 * self.log_scale).exp()
        total = self.noise / variance  # h + λ
        change = (1 - self.beta2) * ((of_scale + self.noise) / variance - (total - decay))
        total = total + change + change.square() / (2 * total)
        self.log_scale.copy_((self.noise / total).log() / 2)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - beta1)
        newton = (momentum / (1 - beta1 ** state["step"]) + decay * self.loc) / total
        self.loc.sub_(RATE * group["lr"] * CURVATURE * newton)
        return None


class Ivon(MeanField):
    """A :class:`MeanField` guide whose loc and scale take the steps of :class:`Newton`, so that a scale is √(T/(N(h+λ))) of the curvature h.

    The curvature is an average over about a fifth of a training, β₂ = 1 − 5/(number of steps), so that little of h₀ is left at its
    end. A training in several calls of :func:`pyro_lottery.train` counts the steps until the end of each call.
    Raises ``UserError`` for a model that does not know its number of training examples.
    """

    takes_kl_warmup = False
    decays_as_prior = True

    def __init__(
        self, model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None
    ):
        super().__init__(model, init_scale, *prototype_args, create_plates=create_plates)
        owner: Any = model_of(self)
        if not hasattr(owner, "num_data"):
            raise UserError(
                "ivon needs the number of training examples; use it with a network of this package, such as BayesianClassifier"
            )
        scale = init_scale / 0.01 * math.sqrt(owner.kl_temperature / (owner.num_data * CURVATURE))
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))

    def optimizer(self, groups: Iterable[dict[str, Any]], lr: float) -> Adam:
        return Newton(groups, lr, self.loc, self.log_scale, 0.0, fused=True)

    def step_begins(self, optimizer: Any, model: Any, done: int, steps: int) -> None:
        optimizer.noise, optimizer.beta2 = model.kl_temperature / model.num_data, 1 - 5 / max(10, steps)


def ivon(model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None) -> Ivon:
    """A mean-field guide that is trained by natural gradients (Shen et al. 2024, Variational Learning is Effective for Large Deep Networks).

    All weights have the same initial scale, √(T/(N(h₀+λ))) with h₀+λ = 0.5 for the usual ``init_scale`` of 0.01, and proportional to it. The
    other arguments are those of :func:`swag`. Raises ``UserError`` for a model that does not know its number of training examples.
    """
    return Ivon(model, init_scale, *prototype_args, create_plates=create_plates)
