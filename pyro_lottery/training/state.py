"""Where a training is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.optim import Adam

from pyro_lottery import guides
from pyro_lottery.distributed import Alone
from pyro_lottery.errors import UserError
from pyro_lottery.training.history import History


@dataclass
class Progress:
    """Where a training is: ``epoch`` and ``step`` are the next ones to do."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    """Of the running epoch."""
    history: History = field(default_factory=list)
    sums: Tensor = field(default_factory=lambda: torch.zeros(5))
    """Of the running epoch: nll, T·KL, the model's tally, examples, and steps before the first bad loss."""
    generators: dict[str, Tensor] = field(default_factory=dict)
    """States of the random generators within an epoch; an epoch's start needs none, since it is seeded by name."""


@dataclass(eq=False)
class TrainState:
    """Where a training is, so that another call of :func:`train` can go on; every call moves it on, epoch by epoch.

    ``TrainState(k)`` begins at epoch k with Adam's moments at 0.
    """

    epoch: int = 0
    """The next epoch, counted from 0: it chooses the learning rate, the KL weight and the random streams."""
    moments: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Adam's, as in the optimizer's state dict; under a mask, of the surviving weights."""
    trained: dict[str, tuple[torch.Size, bool]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    """The parameters and the masks that ``moments`` belong to."""

    def check(self, model: nn.Module, guide: AutoGuide) -> None:
        """Raise ``UserError`` unless this state is of ``model`` and ``guide`` under the masks around this call."""
        if type(self.epoch) is not int or self.epoch < 0:
            raise UserError(f"the epoch of a TrainState must be a whole number, at least 0, got {self.epoch!r}")
        named = (*guide.named_parameters(), *model.named_parameters())
        trained, masks = {n: (p.shape, p.requires_grad) for n, p in named}, guides.active_masks(guide)
        same = trained == self.trained and masks.keys() == self.masks.keys()
        if self.moments and not (
            same and all(torch.equal(m.to(masks[n].device), masks[n]) for n, m in self.masks.items())
        ):
            raise UserError(
                "the TrainState holds Adam's moments of another network, guide or mask; to go on at its epoch without "
                f"them, give TrainState({self.epoch})"
            )
        self.trained, self.masks = trained, masks

    def load(self, optimizer: Adam) -> None:
        """Give ``optimizer`` the moments, if there are any."""
        if self.moments:
            optimizer.load_state_dict({"state": self.moments, "param_groups": optimizer.state_dict()["param_groups"]})

    def move_on(self, epoch: int, optimizer: Adam) -> None:
        """Note that all before ``epoch`` is trained."""
        self.epoch, self.moments = epoch, optimizer.state_dict()["state"]


def generators_of(order: torch.Generator, device: torch.device, ranks: Alone) -> dict[str, Tensor]:
    noise = ranks.gather(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())
    return {"order": order.get_state()} | {noise_of(rank): state for rank, state in enumerate(noise)}


def noise_of(rank: int) -> str:
    """What the state of a rank's weight noise is called in a checkpoint."""
    return f"noise{rank or ''}"


def set_generators(states: dict[str, Tensor], order: torch.Generator, device: torch.device, ranks: Alone) -> None:
    if states:
        order.set_state(states["order"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[noise_of(ranks.rank)], device)
        else:
            torch.set_rng_state(states[noise_of(ranks.rank)])
