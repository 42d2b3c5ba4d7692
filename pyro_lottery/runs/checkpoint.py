"""What a run does while a level trains: it saves checkpoints, shows progress and stops on signals."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pyro_lottery import guides, masks, training
from pyro_lottery.errors import Damaged, Stopped, UserError, one_line
from pyro_lottery.names import joined, under
from pyro_lottery.runs.build import Setup
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.progress import LevelDisplay
from pyro_lottery.runs.signals import Received
from pyro_lottery.training import TrainState
from pyro_lottery.types import Mask, Posterior, Sites, Ticket, infinite_info, ticket_checksum

CHECKPOINT_SECONDS = 5.0
"""Shortest time between two checkpoints at the ends of epochs. Slow saving makes them rarer, so that saving takes at most
about a twentieth of the time."""


class LevelHooks(training.Hooks):
    """Hooks that save checkpoints, show progress and stop on signals while ``level`` trains."""

    def __init__(self, run: RunFolder, level: int, setup: Setup, ticket: Ticket, received: Received):
        self.folder, self.model, self.guide, self.received = run.level(level), setup.model, setup.guide, received
        self.ranks = setup.ranks
        config = setup.config
        self.first, self.epochs = config.first_epoch(level), config.epochs
        self.steps = training.steps_in(setup.data.train, config.batch_size, setup.ranks.least)
        self.measure = training.measure_name(setup.model)
        self.columns = set(training.columns(setup.model))
        self.columns |= {f"{part}_{self.measure}" for part in ("test", *(["val"] if setup.data.val else []))}
        self.rewind_point, self.rewind_epoch = run.rewind_point, config.rewind_epoch if level == 0 else 0
        self.ticket = ticket_checksum(ticket)
        self._begun: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None  # what begin() has read
        self.rewind: str | None = None  # the checksum of the rewind point's file, once it is written
        end = config.prune_to if level == 0 else None
        self.display = LevelDisplay(level, config.levels, masks.density(ticket.mask), config.epochs, end=end)
        self.next_save = time.monotonic() + CHECKPOINT_SECONDS

    def __enter__(self) -> None:
        self.display.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.display.__exit__(*exception)

    def begin(self, mask: Mask) -> Mask:
        loaded = self._begun = self.ranks.first(self._load)
        moved = None if loaded is None else training.mask_of(loaded[0])
        if moved is not None and {n: m.shape for n, m in moved.items()} != {n: m.shape for n, m in mask.items()}:
            raise Damaged(
                f"{self.folder.checkpoint} belongs to another network; remove the level's checkpoints to train it from its start"
            )
        return mask if moved is None else moved

    def start(self, state: TrainState) -> None:
        loaded = self._begun or self.ranks.first(self._load)
        self._begun = None
        if loaded is None:
            return
        tensors, info = loaded
        try:
            state.load_state_dict(info | tensors)
            self._check(state)
            self.guide.load_state_dict(under("guide/", tensors))
            self.model.load_net_state(under("net/", tensors))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise Damaged(
                f"{self.folder.checkpoint} belongs to another training ({one_line(error)}); remove the level's checkpoints to "
                "train it from its start"
            ) from error

    def _load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The checkpoint to resume from; None, with a warning, if it belongs to another ticket or the rewind point has changed."""
        loaded = self.folder.load_checkpoint()
        if loaded is None:
            return None
        _, info = loaded
        if info.get("ticket", self.ticket) != self.ticket:
            problem = f"{self.folder.checkpoint} belongs to another ticket"
        elif "rewind" in info and info["rewind"] != self.rewind_point.posterior_crc():
            problem = f"{self.rewind_point.path} is not the rewind point that this training wrote"
        else:
            self.rewind = info.get("rewind")
            return loaded
        warnings.warn(f"{problem}; the level is trained from its start", stacklevel=2)
        return None

    def _check(self, state: TrainState) -> None:
        """Raise ``UserError`` unless the state lies within this level."""
        rows, begun = state.history, state.epoch > self.first or state.step > 0
        parameters = sum(len(group["params"]) for group in guides.parameter_groups(self.model, self.guide, 0.0))
        if not (
            self.first <= state.epoch <= self.epochs
            and state.step < self.steps
            and all(row.keys() == self.columns for row in rows)
            and [row["epoch"] for row in rows] == list(range(self.first + 1, state.epoch + 1))
            and (not begun or len(state.moments) == parameters)
        ):
            raise UserError(
                f"{len(rows)} epochs from {self.first} to {state.epoch}, step {state.step}, moments of "
                f"{len(state.moments)} of {parameters} parameters"
            )

    def _shown(self, measured: float) -> str:
        return f"accuracy {100 * measured:.2f} %" if self.measure == "accuracy" else f"RMSE {measured:.4g}"

    def stopping(self) -> bool:
        return bool(self.received)

    def stop(self, state: TrainState) -> None:
        saved = state.state_dict()  # on every rank, because it gathers the noise of all ranks
        self.ranks.first(self._save, saved)
        raise Stopped

    def progress(self, state: TrainState, steps: int, nll: float, measured: float) -> None:
        if state.step < steps:  # epoch_ended() shows the end of an epoch
            speed = self.model.num_data * state.step / steps / max(state.seconds, 1e-9)
            shown = f"nll {nll:.4f}, train {self._shown(measured)}, {speed:,.0f} examples/s"
            self.display.update(state.epoch + state.step / steps, shown)

    def epoch_ended(self, state: TrainState) -> None:
        row = state.history[-1]
        last = state.epoch == self.epochs
        test = f"test {self._shown(row[f'test_{self.measure}'])}"
        self.display.update(state.epoch, f"loss {row['loss']:.4f}, nll {row['nll']:.4f}, {test}", last)
        if state.epoch == self.rewind_epoch:
            posterior = guides.posterior(self.guide), self.model.net_state()
            self.ranks.first(self._save_rewind_point, *posterior)
        if self.ranks.any(bool(self.received)):
            self.stop(state)
        if self.ranks.first(self._due, last):
            self.ranks.first(self._save, state.state_dict())

    def _save_rewind_point(self, posterior: Posterior, net: Sites) -> None:
        self.rewind_point.save_posterior(posterior, net)
        self.rewind = self.rewind_point.posterior_crc()

    def _due(self, last: bool) -> bool:
        """Whether this end of an epoch is saved; the first rank's clock decides. The ``last`` epoch's always is."""
        return last or time.monotonic() >= self.next_save

    def measuring(self) -> AbstractContextManager[None]:
        """A context for the measurements after the last epoch, which may take minutes.

        A signal stops them at once if one process trains alone.
        """
        return self.received.at_once() if self.ranks.world == 1 else nullcontext()

    def _save(self, state: Mapping[str, Any]) -> None:
        """Save the state with the guide and the network: tensors as tensors, everything else as JSON."""
        began = time.monotonic()
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        info = {name: value for name, value in state.items() if name not in tensors} | {"ticket": self.ticket}
        info |= {} if self.rewind is None else {"rewind": self.rewind}
        tensors |= joined({"guide": self.guide.state_dict(), "net": self.model.net_state()})
        self.folder.save_checkpoint(tensors, info | infinite_info(tensors))
        self.next_save = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * (time.monotonic() - began))
