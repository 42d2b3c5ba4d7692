"""Stochastic gradient Monte Carlo: guides that are mean and standard deviation of samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam

from pyro_lottery.errors import UserError
from pyro_lottery.guides.found import Swag

REACH = 0.01
"""Least distance that a weight must be able to move, as a random walk, in the steps that sample: the guides' initial scale."""


class Langevin(Adam):
    """Adam, which for ``noisy`` parameters becomes preconditioned Langevin dynamics while :attr:`noise` is set (Li et al. 2016).

    w ← w − ε G ∇L + √(2 ε s G) η with the learning rate ε, the preconditioner G = min(1/(√v + 10⁻⁸), ε/(2s)) of Adam's second moments v, which
    stay as they are meanwhile, standard normal η and s = ``noise``. The bound lets a step's noise be ε at most, as Adam's steps are. For
    small ε it samples exp(−L/s).

    With a ``friction`` α below 1 the weights keep a velocity, v ← (1−α)v − ε G ∇L + √(2αε s G) η and w ← w + v, which is stochastic
    gradient Hamiltonian Monte Carlo (Chen et al. 2014). The velocity takes the place of Adam's first moments.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        noisy: Iterable[Tensor],
        friction: float = 1.0,
        **options: Any,
    ):
        super().__init__(groups, lr, **options)
        self.noisy, self.noise, self.friction = list(noisy), None, friction

    noise: float | None

    @torch.no_grad()
    def rest_(self) -> None:
        """Set the velocities to 0."""
        for parameter in self.noisy:
            if "exp_avg" in self.state[parameter]:
                self.state[parameter]["exp_avg"].zero_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        if self.noise is None:
            return super().step(closure)
        held = [(parameter, parameter.grad) for parameter in self.noisy]
        for parameter, _ in held:
            parameter.grad = None  # so that Adam leaves it alone
        super().step()
        for group in self.param_groups:
            for parameter, gradient in held:
                if gradient is not None and any(parameter is p for p in group["params"]):
                    parameter.grad = gradient
                    self._sample_(parameter, gradient, group)
        return None

    def _sample_(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        assert self.noise is not None
        state, rate = self.state[parameter], group["lr"]
        if "exp_avg_sq" not in state:
            raise UserError(
                "these are the last steps of a training, which sample with the moments of those before, and there are none; give the state of the training "
                "itself, or train for more epochs"
            )
        second = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
        preconditioner = (1 / (second.sqrt() + group["eps"])).clamp(max=rate / (2 * self.noise))
        drift = preconditioner * (gradient + group["weight_decay"] * parameter)
        spread = (2 * self.friction * self.noise * preconditioner * rate).sqrt()
        change = spread * torch.randn_like(parameter) - rate * drift
        if self.friction < 1:
            change = state["exp_avg"].mul_(1 - self.friction).add_(change)
        parameter.add_(change)


class Sgld(Swag):
    """A guide with mean and variance of samples by preconditioned stochastic gradient Langevin dynamics (Welling and Teh 2011, Li et al. 2016).

    Three quarters of a training find a mode by Adam; the last quarter samples p(w)·p(D | w)^(1/T) times what weight decay adds, with the
    learning rate of the schedule, which milestones should leave large enough for a weight to move by more than its scale. A training in several calls of
    :func:`pyro_lottery.train` samples in the last quarter of each, and only the last call's samples count. As in :class:`Swag`, ``SNAPSHOTS`` samples, or one at every step, give loc and scale. It trains on one device: several would
    need the same noise. Raises ``UserError`` for a site whose values are not all real numbers, such as a positive hyperparameter.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, place in self.places.items():
            if place.transform is not None:
                raise UserError(
                    f"{type(self).__name__.lower()} samples numbers on the real line, and {name!r} is not on it; sample its logarithm from a Normal, or use "
                    "another guide"
                )

    friction: ClassVar[float] = 1.0
    takes_ranks = False
    decays_as_prior = True

    def optimizer(self, groups: Iterable[dict[str, Any]], lr: float) -> Adam:
        return Langevin(groups, lr, [self.loc], self.friction, fused=True)

    def step_begins(self, optimizer: Any, model: Any, done: int, steps: int) -> None:
        first = steps - steps // 4
        optimizer.noise = model.kl_temperature / model.num_data if done >= first else None
        if done == first:
            optimizer.rest_()
            rate, left = float(optimizer.param_groups[0]["lr"]), steps - first
            if (reach := rate * left**0.5) < REACH:
                warnings.warn(
                    f"{type(self).__name__.lower()} samples with the learning rate {rate:g} for {left:,} steps, in which a weight moves by {reach:.2g}, so that "
                    "its scales are those of the steps and not of the posterior; train longer, or with milestones that leave a larger rate",
                    stacklevel=2,
                )


class Sghmc(Sgld):
    """:class:`Sgld` with a velocity and friction 0.1 (Chen et al. 2014, Stochastic Gradient Hamiltonian Monte Carlo)."""

    friction = 0.1


def sgld(model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None) -> Sgld:
    """A guide that trains loc as a point, and whose loc and scale are those of Langevin samples from the last steps.

    The arguments are those of :func:`mean_field` but ``max_scale`` and ``train_scale``. Before they are found, the scales are the initial ones.
    """
    return Sgld(model, init_scale, *prototype_args, create_plates=create_plates)


def sghmc(
    model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None
) -> Sghmc:
    """A guide like :func:`sgld`, whose samples are those of Hamiltonian Monte Carlo with friction.

    The arguments are those of :func:`mean_field` but ``max_scale`` and ``train_scale``. Before they are found, the scales are the initial ones.
    """
    return Sghmc(model, init_scale, *prototype_args, create_plates=create_plates)
