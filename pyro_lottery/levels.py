"""Levels: train a ticket under its mask, measure it and save all of it; with checkpoints, display and signals.

Iterative pruning trains its levels here, and so do controls and transplants.
"""

from __future__ import annotations

import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch.optim import Adam

from pyro_lottery import figures, guides, masks, metrics, runs, seeds, training
from pyro_lottery.config import Config
from pyro_lottery.console import LevelDisplay
from pyro_lottery.data import Data
from pyro_lottery.errors import Stopped
from pyro_lottery.handlers import sparsify
from pyro_lottery.model import BayesianClassifier
from pyro_lottery.prediction import has_bf16, predict, resolve_precision
from pyro_lottery.results import LevelFolder, RunFolder
from pyro_lottery.types import LevelResult, Ticket

CHECKPOINT_SECONDS = 5.0
"""Least time between two checkpoints of quick epochs; slower epochs are saved each. Where saving itself is slow, it is
made so rare that it takes at most a twentieth of the time."""
DRAW_SECONDS = 10.0
"""Least time between two drawings of a run's figures, which cost more than a small network's training."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What training needs, made from a config."""

    config: Config
    """With the precision that ``auto`` stands for here."""
    data: Data
    model: BayesianClassifier
    guide: AutoGuide
    dense: Ticket
    """All weights at the initial values that ``config.seed`` draws."""
    facts: dict[str, Any]
    """What ``config.json`` records beside the options."""


def prepare(config: Config) -> Setup:
    """Load the data and build model and guide of ``config``; ``UserError`` for whatever cannot be trained here."""
    runs.check_names(config)
    device = runs.resolve_device(config.device)
    config = replace(config, precision=resolve_precision(config.precision, device))
    if config.precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        warnings.warn(
            "this processor has no bf16 instructions: --precision bf16 is emulated, about ten times slower than 32",
            stacklevel=2,
        )
    data = runs.load_data(config, device)
    shape = runs.shape_of(data)
    model, guide = runs.build(config, shape, device)
    training.check_batches(model, data, config.batch_size)
    return Setup(config, data, model, guide, runs.dense_ticket(model, guide), runs.facts(config, shape, device))


def train_levels(
    run: RunFolder,
    setup: Setup,
    levels: Iterable[int],
    ticket_of: Callable[[int], Ticket],
    received: Sequence[int],
) -> None:
    """Train the ticket of each of ``levels`` that is not finished, and draw the run's figures.

    Raises ``Stopped`` between two levels, or within one after saving it, when ``received`` holds a signal.
    """
    finished, drawn = {row.level for row in run.results()}, time.monotonic()
    for level in levels:
        if level in finished:
            continue
        if received:
            raise Stopped
        ticket = ticket_of(level)
        hooks = LevelHooks(run, level, setup, masks.density(ticket.mask), received)
        run.add_result(train_level(run.level(level), level, ticket, setup, hooks))
        run.level(level).drop_checkpoints()
        if time.monotonic() - drawn > DRAW_SECONDS:
            figures.draw_run(run)
            drawn = time.monotonic()
    figures.draw_run(run)


def train_level(folder: LevelFolder, level: int, ticket: Ticket, setup: Setup, hooks: LevelHooks) -> LevelResult:
    """Train one ticket, measure it, and save all of it in ``folder``; returns its row of ``results.csv``."""
    config, data, model, guide = setup.config, setup.data, setup.model, setup.guide
    device = data.train.pixels.device
    folder.save_ticket(ticket)
    with sparsify(model.start_from_(guide, ticket)):
        with hooks:
            history = training.train(model, guide, data, **_train_options(config), level=level, hooks=hooks)
        with seeds.stream(device, config.seed, "predict", level):
            probs = predict(model, guide, data.test, config.eval_samples, precision=config.precision)
    measured = metrics.all_metrics(probs, data.test.labels)
    folder.save_posterior(masks.apply(ticket.mask, guides.posterior(guide)), model.net_state())
    folder.save_history(history)
    chosen = max(history, key=lambda row: row["val_accuracy"]) if data.val is not None else None
    seconds = [row["seconds"] for row in history]
    steps = training.steps_per_epoch(len(data.train), config.batch_size)
    return LevelResult(
        level=level,
        density=masks.density(ticket.mask),
        remaining=masks.remaining(ticket.mask),
        total=masks.total(ticket.mask),
        test_accuracy=measured["accuracy"],
        max_test_accuracy=max(measured["accuracy"], *(row["test_accuracy"] for row in history)),
        val_accuracy=chosen["val_accuracy"] if chosen else None,
        nll=measured["nll"],
        mace=measured["mace"],
        ece=measured["ece"],
        brier=measured["brier"],
        train_seconds=sum(seconds),
        step_ms=1000 * statistics.median(seconds) / steps,
        selected_test_accuracy=chosen["test_accuracy"] if chosen else None,
    )


class LevelHooks(training.Hooks):
    """Checkpoints, the display and the signals of one level's training."""

    def __init__(self, run: RunFolder, level: int, setup: Setup, density: float, received: Sequence[int]):
        self.folder, self.model, self.guide, self.received = run.level(level), setup.model, setup.guide, received
        config = setup.config
        self.epochs = config.epochs
        self.rewind_point, self.rewind_epoch = run.rewind_point, config.rewind_epoch if level == 0 else 0
        self.display = LevelDisplay(level, config.levels, density, config.epochs)
        self.next_save = time.monotonic() + CHECKPOINT_SECONDS

    def __enter__(self) -> None:
        self.display.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.display.__exit__(*exception)

    def start(self, optimizer: Adam) -> training.Progress | None:
        loaded = self.folder.load_checkpoint()
        if loaded is None:
            return None
        tensors, info = loaded
        device, generators = next(self.guide.parameters()).device, _group(tensors, "generator")
        if generators and info["device"] != device.type:
            warnings.warn(
                f"this epoch began on {info['device']}; its random numbers begin anew on {device}", stacklevel=2
            )
            generators = {}
        self.guide.load_state_dict(_group(tensors, "guide"))
        self.model.load_net_state(_group(tensors, "net"))
        _load_optimizer(optimizer, _group(tensors, "optimizer"))
        return training.Progress(
            info["epoch"], info["step"], info["seconds"], info["history"], tensors["sums"], generators
        )

    def stopping(self) -> bool:
        return bool(self.received)

    def stop(self, progress: training.Progress, optimizer: Adam) -> None:
        self._save(progress, optimizer)
        raise Stopped

    def check(self, progress: training.Progress, steps: int, nll: float, accuracy: float) -> None:
        state = f"nll {nll:.4f}, train accuracy {100 * accuracy:.2f} %"
        if progress.step < steps:  # an epoch's end has its own line
            self.display.update(progress.epoch + progress.step / steps, state)

    def epoch(self, progress: training.Progress, optimizer: Adam) -> None:
        row = progress.history[-1]
        test, last = f"test accuracy {100 * row['test_accuracy']:.2f} %", progress.epoch == self.epochs
        self.display.update(progress.epoch, f"loss {row['loss']:.4f}, nll {row['nll']:.4f}, {test}", last)
        if progress.epoch == self.rewind_epoch:
            self.rewind_point.save_posterior(guides.posterior(self.guide), self.model.net_state())
        if self.received:
            self.stop(progress, optimizer)
        if time.monotonic() >= self.next_save:
            self._save(progress, optimizer)

    def _save(self, progress: training.Progress, optimizer: Adam) -> None:
        began = time.monotonic()
        tensors = {f"guide/{n}": t for n, t in self.guide.state_dict().items()}
        tensors |= {f"net/{n}": t for n, t in self.model.net_state().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{n}": t for n, t in state.items()}
        tensors |= {f"generator/{n}": t for n, t in progress.generators.items()} | {"sums": progress.sums}
        info: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, "seconds": progress.seconds}
        info["device"] = next(self.guide.parameters()).device.type
        self.folder.save_checkpoint(tensors, info | {"history": progress.history})
        self.next_save = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * (time.monotonic() - began))


def _train_options(config: Config) -> dict[str, Any]:
    taken = inspect.signature(training.train).parameters.values()
    return {p.name: getattr(config, p.name) for p in taken if p.kind is p.KEYWORD_ONLY and hasattr(config, p.name)}


def _group(tensors: dict[str, torch.Tensor], group: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{group}/"): t for name, t in tensors.items() if name.startswith(f"{group}/")}


def _load_optimizer(optimizer: Adam, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
