"""Normal guides whose scales are found at a trained point instead of being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_lottery.guides.mean_field import MeanField


class Found(MeanField):
    """q(w) = Π N(w; loc, scale²), which is a point at loc while it trains: MAP, or maximum likelihood under ``priors.flat``.

    The point is also pulled by weight decay. :func:`pyro_lottery.posteriors.find_scales_` sets the scales afterwards. Until then they are the
    initial ones.
    """

    scales_are_trained = False
    takes_scales = True
    _trains = False

    def __init__(
        self, model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None
    ):
        super().__init__(model, init_scale, *prototype_args, create_plates=create_plates, train_scale=False)

    @property
    def is_point(self) -> bool:  # type: ignore[override]  # a constant of other families
        """Whether the guide is being trained."""
        return self._trains

    @contextmanager
    def training_point(self) -> Iterator[None]:
        before, self._trains = self._trains, True
        try:
            yield
        finally:
            self._trains = before

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site of the model, or set it to its loc in training; returns the values by site, with the sites' shapes."""
        if not self._trains:
            return super().forward(*args, **kwargs)
        return self.draw_point(*args)


class Laplace(Found):
    """A :class:`Found` guide whose scales are those of a diagonal Laplace approximation (MacKay 1992, A Practical Bayesian Framework)."""

    decays_as_prior = True


class Swag(Found):
    """A :class:`Found` guide with mean and variance of the weights that training passes through at its end (Maddox et al. 2019, SWAG-Diagonal).

    It collects them within the last quarter of the steps, ``SNAPSHOTS`` times or at every step. A training in several calls of
    :func:`pyro_lottery.train` collects in the last of them alone.
    """

    flat: ClassVar[tuple[str, ...]] = ("loc", "log_scale", "mean", "squares")

    def __init__(
        self, model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None
    ):
        super().__init__(model, init_scale, *prototype_args, create_plates=create_plates)
        self.mean, self.squares = (nn.Parameter(torch.zeros_like(self.loc), requires_grad=False) for _ in range(2))
        self.taken = 0
        """Snapshots of this training so far."""

    @contextmanager
    def training_point(self) -> Iterator[None]:
        self.taken = 0  # a checkpoint that is loaded within this context sets it again
        with super().training_point():
            yield

    @torch.no_grad()
    def step_ended(self, done: int, steps: int) -> None:
        if snapshots(done, steps) == snapshots(done - 1, steps):
            return
        self.taken += 1
        if self.taken == 1:
            self.mean.copy_(self.loc)
            self.squares.zero_()
            return
        before = self.loc - self.mean  # Welford's algorithm, which loses no digits
        self.mean.add_(before / self.taken)
        self.squares.add_(before * (self.loc - self.mean))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}taken"] = torch.tensor(self.taken)

    def _load_from_state_dict(self, state: Any, prefix: str, *more: Any) -> None:
        own = dict(state)
        self.taken = int(own.pop(f"{prefix}taken", torch.tensor(0)))
        super()._load_from_state_dict(own, prefix, *more)


SNAPSHOTS = 30
"""How often :class:`Swag` collects weights."""


def snapshots(done: int, steps: int) -> int:
    """How many snapshots have been taken after ``done`` of ``steps`` steps; the last step takes one.

    >>> [snapshots(done, 8) for done in (5, 6, 7, 8)]
    [0, 0, 1, 2]
    """
    between = max(1, steps // 4 // SNAPSHOTS)
    return max(0, (done - (steps - steps // 4 // between * between)) // between)


def laplace(
    model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None
) -> Laplace:
    """A guide that trains loc as a point, and whose scales follow from the curvature there.

    The arguments are those of :func:`mean_field` but ``max_scale`` and ``train_scale``. Before the scales are found, they are the initial ones.
    """
    return Laplace(model, init_scale, *prototype_args, create_plates=create_plates)


def swag(model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, create_plates: Any = None) -> Swag:
    """A guide that trains loc as a point, and whose loc and scale follow from the last steps.

    The arguments are those of :func:`mean_field` but ``max_scale`` and ``train_scale``. Before they are found, the scales are the initial ones.
    """
    return Swag(model, init_scale, *prototype_args, create_plates=create_plates)
