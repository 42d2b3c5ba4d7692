"""Checkpoints, the display and the signals of one level's training."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim import Adam

from pyro_lottery import files, guides, masks, training
from pyro_lottery.errors import Damaged, Stopped, one_line
from pyro_lottery.runs.build import Setup
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.progress import LevelDisplay
from pyro_lottery.runs.signals import Received
from pyro_lottery.types import Posterior, Sites, Ticket, infinite_info

CHECKPOINT_SECONDS = 5.0
"""Least time between two checkpoints of quick epochs; slower epochs are saved each. Where saving itself is slow, it is
made so rare that it takes at most a twentieth of the time."""


class LevelHooks(training.Hooks):
    """Checkpoints, the display and the signals of one level's training."""

    def __init__(self, run: RunFolder, level: int, setup: Setup, ticket: Ticket, received: Received):
        self.folder, self.model, self.guide, self.received = run.level(level), setup.model, setup.guide, received
        self.ranks = setup.ranks
        config = setup.config
        self.first, self.epochs = config.first_epoch(level), config.epochs
        self.steps = training.steps_in(setup.data.train, config.batch_size, setup.ranks.least)
        self.measure = training.measure(setup.model)
        self.columns = set(training.columns(setup.model))
        self.columns |= {f"{part}_{self.measure}" for part in ("test", *(["val"] if setup.data.val else []))}
        self.rewind_point, self.rewind_epoch = run.rewind_point, config.rewind_epoch if level == 0 else 0
        self.ticket = ticket_checksum(ticket)
        self.display = LevelDisplay(level, config.levels, masks.density(ticket.mask), config.epochs)
        self.next_save = time.monotonic() + CHECKPOINT_SECONDS

    def __enter__(self) -> None:
        self.display.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.display.__exit__(*exception)

    def start(self, optimizer: Adam) -> training.Progress | None:
        loaded = self.ranks.first(self.folder.load_checkpoint)
        if loaded is None:
            return None
        if loaded[1].get("ticket", self.ticket) != self.ticket:
            warnings.warn(f"{self.folder.checkpoint} is of another ticket; the level begins anew", stacklevel=2)
            return None
        try:
            return self._go_on(optimizer, *loaded)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise Damaged(
                f"{self.folder.checkpoint} is of another training ({one_line(error)}); remove the checkpoints there to "
                "train the level from its start"
            ) from error

    def _go_on(self, optimizer: Adam, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> training.Progress:
        device, generators = next(self.guide.parameters()).device, _group(tensors, "generator")
        if generators and info["device"] != device.type:
            warnings.warn(
                f"this epoch began on {info['device']}; its random numbers begin anew on {device}", stacklevel=2
            )
            generators = {}
        for name in ("order", *map(training.noise_of, range(self.ranks.world))) if generators else ():
            torch.Generator(device).set_state(generators[name])  # fails for what is no state
        self.guide.load_state_dict(_group(tensors, "guide"))
        self.model.load_net_state(_group(tensors, "net"))
        epoch, step, history, sums = info["epoch"], info["step"], info["history"], tensors["sums"]
        _load_optimizer(optimizer, _group(tensors, "optimizer"), epoch > self.first or step > 0)
        if not type(epoch) is type(step) is int or (step > 0 and not _group(tensors, "generator")):
            raise ValueError("no whole step")
        numbers = all(isinstance(value, float | int) for row in history for value in row.values())
        columns = all(row.keys() == self.columns for row in history)
        if not (
            numbers
            and columns
            and self.first <= epoch <= self.epochs
            and [row["epoch"] for row in history] == list(range(self.first + 1, epoch + 1))
            and 0 <= step < self.steps
            and sums.shape == (5,)
            and sums.dtype == torch.float32
        ):
            raise ValueError(f"{len(history)} epochs from {self.first} to {epoch}, step {step}")
        return training.Progress(epoch, step, float(info["seconds"]), history, sums, generators)

    def _shown(self, measured: float) -> str:
        return f"accuracy {100 * measured:.2f} %" if self.measure == "accuracy" else f"RMSE {measured:.4g}"

    def stopping(self) -> bool:
        return bool(self.received)

    def stop(self, progress: training.Progress, optimizer: Adam) -> None:
        self.ranks.first(lambda: self._save(progress, optimizer))
        raise Stopped

    def check(self, progress: training.Progress, steps: int, nll: float, measured: float) -> None:
        state = f"nll {nll:.4f}, train {self._shown(measured)}"
        if progress.step < steps:  # an epoch's end has its own line
            self.display.update(progress.epoch + progress.step / steps, state)

    def epoch(self, progress: training.Progress, optimizer: Adam) -> None:
        row = progress.history[-1]
        last = progress.epoch == self.epochs
        test = f"test {self._shown(row[f'test_{self.measure}'])}"
        self.display.update(progress.epoch, f"loss {row['loss']:.4f}, nll {row['nll']:.4f}, {test}", last)
        if progress.epoch == self.rewind_epoch:
            posterior = guides.posterior(self.guide), self.model.net_state()
            self.ranks.first(lambda: self.rewind_point.save_posterior(*posterior))
        if self.ranks.any(bool(self.received)):
            self.stop(progress, optimizer)
        due = time.monotonic() >= self.next_save or progress.epoch == self.epochs
        self.ranks.first(lambda: self._save(progress, optimizer) if due else None)

    def measuring(self) -> AbstractContextManager[None]:
        """For what comes after the last epoch, which may take minutes: one process can be stopped at any moment of it."""
        return self.received.at_once() if self.ranks.world == 1 else nullcontext()

    def _save(self, progress: training.Progress, optimizer: Adam) -> None:
        began = time.monotonic()
        tensors = {f"guide/{n}": t for n, t in self.guide.state_dict().items()}
        tensors |= {f"net/{n}": t for n, t in self.model.net_state().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{n}": t for n, t in state.items()}
        tensors |= {f"generator/{n}": t for n, t in progress.generators.items()} | {"sums": progress.sums}
        info: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, "seconds": progress.seconds}
        info |= {"device": next(self.guide.parameters()).device.type, "ticket": self.ticket}
        self.folder.save_checkpoint(tensors, info | {"history": progress.history} | infinite_info(tensors))
        self.next_save = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * (time.monotonic() - began))


def ticket_checksum(ticket: Ticket) -> int:
    return checksum(ticket.start, ticket.net, {name: mask.bool() for name, mask in ticket.mask.items()})


def checksum(posterior: Posterior, *more: Sites) -> int:
    groups = enumerate((posterior.loc, posterior.scale or {}, *more))
    return files.checksum({f"{group}/{name}": value.cpu() for group, sites in groups for name, value in sites.items()})


def _group(tensors: dict[str, torch.Tensor], group: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{group}/"): t for name, t in tensors.items() if name.startswith(f"{group}/")}


_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


def _load_optimizer(optimizer: Adam, tensors: dict[str, torch.Tensor], begun: bool) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        shape = torch.Size() if key == "step" else parameters[int(index)].shape
        if key not in _MOMENTS or tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tuple(tensor.shape)}")  # which torch would not notice
        state.setdefault(int(index), {})[key] = tensor
    if any(state[index].keys() != _MOMENTS for index in state) or (begun and len(state) != len(parameters)):
        raise ValueError("some moments of Adam are missing")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
