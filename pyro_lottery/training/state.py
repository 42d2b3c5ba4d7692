"""Where a training is, so that it can stop and go on at any step with the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.optim import Adam

from pyro_lottery import files, guides, seeds
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.errors import UserError, check_counts, one_line
from pyro_lottery.names import joined, under
from pyro_lottery.training.history import History
from pyro_lottery.types import Mask

Moments = dict[int, dict[str, Tensor]]
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


@dataclass(eq=False)
class TrainState:
    """Where a training is: checkpoints, a second call of :func:`train` and a loop of one's own go on from it.

    ``TrainState(k)`` begins at epoch k with Adam's moments at 0. :func:`train` moves the state on, step by step. It holds
    all that a training needs to go on, except the values of the guide and the network, which have state dicts of their own.
    """

    epoch: int = 0
    """The next epoch, counted from 0: it chooses the learning rate, the KL weight and the random streams."""
    step: int = 0
    """The next step of that epoch, counted from 0."""
    seconds: float = 0.0
    """Time spent in that epoch so far."""
    history: History = field(default_factory=list)
    """One row per finished epoch."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float32))
    """Sums over the finished steps of that epoch; see :func:`step`."""
    moments: Moments = field(default_factory=dict)
    """Adam's moments as in the optimizer's state dict; under a mask, only those of the surviving weights."""
    generators: dict[str, Tensor] = field(default_factory=dict)
    """States of the random generators within an epoch. The start of an epoch needs none, since it is seeded by name."""
    device: str = "cpu"
    """The kind of device that ``generators`` are of."""
    belongs: int | None = None
    """Checksum of the names and shapes of the parameters and of the masks that ``moments`` belong to."""

    mask: Mask | None = None
    """The mask that a schedule has moved to (:func:`pyro_lottery.schedules.train`); None before its first move."""
    moved: int = 0
    """Finished steps of all epochs at the last move of the mask."""

    def __post_init__(self) -> None:
        self._optimizer: Adam | None = None
        self._order: torch.Generator | None = None
        self._ranks: Ranks = ALONE

    def check(self, model: nn.Module, guide: AutoGuide) -> None:
        """Raise ``UserError`` unless this state is of ``model`` and ``guide`` under the masks around this call."""
        check_counts(0, **{"the epoch of a TrainState": self.epoch})
        named = (*guide.named_parameters(), *model.named_parameters())
        shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in named]
        masks = {name: mask.cpu() for name, mask in guides.active_masks(guide).items()}
        now = files.checksum(masks, repr(shapes))
        if self.moments and self.belongs not in (None, now):
            raise self._foreign()
        self.belongs = now

    @contextmanager
    def using(self, optimizer: Adam, ranks: Ranks = ALONE) -> Iterator[None]:
        """Give ``optimizer`` the moments, if there are any; within this context the state's moments are the optimizer's."""
        self._give(optimizer)
        self._optimizer, self._ranks = optimizer, ranks
        try:
            yield
        finally:
            self.moments = optimizer.state_dict()["state"]
            self._optimizer = None

    def enter_epoch(self, order: torch.Generator) -> None:
        """Set ``order`` and the random generator of ``order``'s device to where they were within this epoch."""
        if self.generators and self.device != order.device.type:
            warnings.warn(
                f"this epoch began on {self.device}; its random numbers begin anew on {order.device}", stacklevel=2
            )
        elif self.generators:
            order.set_state(self.generators["order"])
            seeds.set_state(order.device, self.generators[noise_of(self._ranks.rank)])
        self.sums = self.sums.to(order.device) * (self._ranks.rank == 0)
        self.device, self._order = order.device.type, order

    def leave_epoch(self) -> None:
        """Keep the states of the random generators of an epoch that is left before its end."""
        if self._ranks.world == 1:  # other ranks may not be here, and would be waited for
            self.generators = self._live_generators()
        self._order = None

    def next_epoch(self, row: dict[str, float] | None = None) -> None:
        """Go to the start of the next epoch, and add ``row`` to the history."""
        self.epoch, self.step, self.seconds, self.sums, self.generators = (
            self.epoch + 1,
            0,
            0.0,
            torch.zeros(5, dtype=torch.float32),
            {},
        )
        self.history = [*self.history, row] if row else self.history

    def state_dict(self) -> dict[str, Any]:
        """All of the state as one flat dict: tensors (``sums``, ``optimizer/I/…``, ``generator/…``, ``mask/…``), numbers and the history.

        Tensors are not copied, as in torch. Within an epoch of several ranks, all of them must call this.
        """
        state: dict[str, Any] = {
            name: getattr(self, name) for name in ("epoch", "step", "seconds", "device", "belongs", "moved")
        }
        moments = self._optimizer.state_dict()["state"] if self._optimizer else self.moments
        tensors = {f"optimizer/{index}/{name}": t for index, own in moments.items() for name, t in own.items()}
        generators = self.generators if self._order is None else self._live_generators()
        mask = {name: m.to(torch.uint8) for name, m in (self.mask or {}).items()}
        tensors |= joined({"generator": generators, "mask": mask})
        return state | {"history": self.history, "sums": self.sums} | tensors

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Become the state that :meth:`state_dict` returned. Raises ``UserError``, and changes nothing, for anything else.

        Tensors are copied. ``belongs`` may be missing, and is then not compared.
        """
        try:
            state = _read(saved, self._ranks.world)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"this is no state of a training: {one_line(error)}; expected the dict that TrainState.state_dict returned"
            ) from error
        if self._optimizer is not None:
            if None not in (state.belongs, self.belongs) and state.belongs != self.belongs:
                raise state._foreign()
            state.belongs = self.belongs
            state._give(self._optimizer)
        vars(self).update({name: getattr(state, name) for name in self.__dataclass_fields__})

    def _give(self, optimizer: Adam) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, moments in self.moments.items():
            for name, value in moments.items():
                known = 0 <= index < len(parameters)
                like = torch.empty(()) if name == "step" or not known else parameters[index]
                if not known or value.shape != like.shape or value.dtype != like.dtype:  # torch would not notice
                    raise self._foreign()
        if self.moments:
            optimizer.load_state_dict({"state": self.moments, "param_groups": optimizer.state_dict()["param_groups"]})

    def _live_generators(self) -> dict[str, Tensor]:
        if self._order is None or not self.step:
            return {}
        states = enumerate(self._ranks.gather(seeds.state_of(self._order.device)))
        return {"order": self._order.get_state()} | {noise_of(rank): state for rank, state in states}

    def _foreign(self) -> UserError:
        return UserError(
            "the TrainState holds Adam's moments of another network, guide or mask; to go on at its epoch without "
            f"them, give TrainState({self.epoch})"
        )


def noise_of(rank: int) -> str:
    """The name of a rank's generator of noise in a state dict."""
    return f"noise{rank or ''}"


def _read(saved: Mapping[str, Any], world: int) -> TrainState:
    """The state in ``saved``; raises any of the usual exceptions for what a stranger may have written."""
    epoch, step, device = saved["epoch"], saved["step"], saved["device"]
    if not type(epoch) is type(step) is int or epoch < 0 or step < 0:
        raise ValueError(f"epoch {epoch!r}, step {step!r}")
    history = [dict(row) for row in saved["history"]]
    if not all(isinstance(value, float | int) for row in history for value in (row["epoch"], *row.values())):
        raise ValueError("a history of other things than numbers")
    sums, belongs = saved["sums"].clone(), saved.get("belongs")
    if sums.shape != (5,) or sums.dtype != torch.float32:
        raise ValueError(f"sums of {tuple(sums.shape)}")
    moments: Moments = {}
    for name, tensor in under("optimizer/", saved).items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = tensor.clone()
    if any(own.keys() != _MOMENTS for own in moments.values()):
        raise ValueError("some moments of Adam are missing")
    # Copied before they are used: torch's set_state crashes on a view into a larger tensor, as Ranks.gather returns.
    generators = {name: state.clone() for name, state in under("generator/", saved).items()} if step else {}
    for name in ("order", *map(noise_of, range(world))) if step else ():
        state = generators[name]
        if device != "cuda" or torch.cuda.is_available():  # of a GPU that is not here it is not used
            torch.Generator(device).set_state(state)  # fails for what is no state
    mask, moved = mask_of(saved), saved.get("moved", 0)
    if type(moved) is not int or moved < 0:
        raise ValueError(f"moved {moved!r}")
    return TrainState(
        epoch, step, float(saved["seconds"]), history, sums, moments, generators, device, belongs, mask, moved
    )


def mask_of(saved: Mapping[str, Any]) -> Mask | None:
    """The mask in a state dict of :class:`TrainState`, bool tensors of the sites' shapes; None if it has none."""
    return {name: m.bool() for name, m in under("mask/", saved).items()} or None
