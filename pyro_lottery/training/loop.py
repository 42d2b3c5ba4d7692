"""One level's training: SVI on one mask from one starting point, as an epoch loop that can stop and go on anywhere."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.optim import Adam

from pyro_lottery import guides, seeds
from pyro_lottery.data import Data, Epoch, StreamEpoch
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.elbo import ELBO
from pyro_lottery.errors import UserError, check_counts
from pyro_lottery.guides.family import family
from pyro_lottery.machine import channels_last_
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.model.mask_check import check_used_weights
from pyro_lottery.threads import TURN, in_one_thread
from pyro_lottery.training.checks import (
    as_data,
    check_batch,
    check_batches,
    check_data,
    check_finite,
    check_rates,
    infinite_buffers,
    is_batch_norm,
)
from pyro_lottery.training.epoch import epoch
from pyro_lottery.training.graph import Record, Steps, Take, recorder
from pyro_lottery.training.history import History, measure_name, measure_of, measured, row_of
from pyro_lottery.training.hooks import Hooks
from pyro_lottery.training.precision import precision_for_data
from pyro_lottery.training.schedule import kl_factor, learning_rate
from pyro_lottery.training.state import TrainState
from pyro_lottery.training.step import EXAMPLES, NLL, step

CHECK_EVERY = 50
"""Steps between two checks of the loss, which are the only points within an epoch that wait for a GPU."""

AGREE_EVERY = 10
"""Steps between checks when several ranks train; they stop only at such a step, together."""


@in_one_thread
def train(
    model: BayesianNetwork,
    guide: AutoGuide,
    data: Any,
    *,
    epochs: int = 160,
    batch_size: int = 128,
    lr: float = 1e-3,
    milestones: tuple[int, ...] = (80, 120),
    warmup_epochs: int = 0,
    weight_decay: float = 1e-4,
    kl_warmup_epochs: int = 0,
    train_samples: int = 1,
    history_samples: int | None = None,
    kl: str = "analytic",
    estimator: str = "weights",
    precision: str = "32",
    graph: str = "auto",
    seed: int = 0,
    level: int = 0,
    state: TrainState | None = None,
    hooks: Hooks | None = None,
    ranks: Ranks = ALONE,
) -> History:
    """Train ``guide`` and the network's own parameters by Adam on the ELBO (paper §3, §4); returns one row per epoch.

    Minimises nll + f·T·KL/N per example, averaged over ``train_samples`` noise samples a batch: T is the model's
    ``kl_temperature``, f the :func:`kl_factor` of the epoch (1 after ``kl_warmup_epochs``), and N the number of training
    examples. ``estimator`` says whether the noise is on the weights or on the outputs of layers (see :class:`ELBO`). To
    prune, call this under :func:`pyro_lottery.handlers.sparsify`. ``precision`` is ``32``, ``tf32`` (on a GPU), ``bf16`` (autocast),
    or ``auto``, the faster of fp32 and bf16 on this machine. ``graph`` says whether a GPU replays a recorded step (``auto``, ``on`` or ``off``), which has
    the same results and spares the GPU from waiting for Python.

    ``data`` is a :class:`Data`, or a bare loader of (x, y) batches, then without test columns: see
    :func:`pyro_lottery.data.from_loaders`. A loader makes its own batches, whatever ``batch_size`` is, and training on one
    stops only at the ends of epochs.

    A row holds ``epoch`` (from 1), ``loss = nll + kl_weight·kl`` in nats (``nll`` per example, ``kl`` without T, ``kl_weight`` =
    f·T/N), ``train_accuracy``, ``test_accuracy`` and, with a validation split, ``val_accuracy`` from ``history_samples``
    posterior samples (default: ``train_samples``), ``lr``, and ``seconds`` of training. Where targets are not classes,
    ``rmse`` replaces ``accuracy``, and is NaN for a likelihood without a mean.

    All randomness follows ``(seed, level, epoch)``, so a second call draws the same batches and noise again, unless
    ``state`` says where it goes on. To train in several calls, give all of them the same :class:`TrainState`: each trains
    until ``epochs`` more are finished, from the state's epoch and step on, with Adam's moments, and the bits are those of one
    call of all epochs; but for guides that collect weights at the end of a call (``swag``, ``sgld``, ``sghmc``, ``ivon``). Milestones and warm-up count from epoch 0. Each of several ``ranks`` takes a part of every batch, or
    all of it with augmentation and noise of its own, and their gradients are averaged.

    On a CPU, large networks train faster in a process that keeps freed memory (:func:`pyro_lottery.machine.keep_memory`), as
    the commands do.

    Raises ``Diverged``, with epoch, step and sites, when a loss or a parameter is not finite. Raises ``UserError`` before
    the first step if the guide is of another model, the state of another training, or the data do not suit the network and
    its likelihood.
    """
    check_counts(0, epochs=epochs, warmup_epochs=warmup_epochs, kl_warmup_epochs=kl_warmup_epochs)
    check_counts(1, batch_size=batch_size, train_samples=train_samples, history_samples=history_samples or 1)
    check_rates(lr=lr, weight_decay=weight_decay)
    guides.check_guide(guide)
    guides.check_sites(model, guide)
    if kl_warmup_epochs and not family(guide).takes_kl_warmup:
        raise UserError(
            f"guide {type(guide).__name__} reads its scales from the curvature, which a KL warm-up would change; use kl_warmup_epochs=0"
        )
    if ranks.world > 1 and not family(guide).takes_ranks:
        raise UserError(
            f"guide {type(guide).__name__} adds noise to each step and trains on one device; use --devices 1 or another guide"
        )
    device, data = next(iter(guide.parameters())).device, as_data(model, guide, data)
    likelihood = check_data(model, data)
    check_batches(model, data, batch_size, ranks)
    record = recorder(graph, device, ranks)
    precision = precision_for_data(precision, model, data, batch_size, ranks)
    hooks, state = hooks or Hooks(), state or TrainState()
    state.check(model, guide)
    first = state.epoch
    channels_last_(model)
    check_used_weights(model, data.train.head()[0])
    with (
        guides.training_point(guide),
        guides.compressed(guide),
    ):  # the parameters are those of surviving weights, so is the optimizer's state
        point = guides.is_point(guide)
        samples = 1 if point else train_samples
        optimizer = family(guide).optimizer(guides.parameter_groups(model, guide, weight_decay), lr)
        elbo = ELBO(kl, estimator="weights" if point else estimator)
        loop = _Loop(
            model, guide, data, likelihood, elbo, optimizer, state, hooks, ranks,
            rates=(lr, milestones, warmup_epochs), kl_warmup_epochs=kl_warmup_epochs, batch_size=batch_size,
            samples=samples, history_samples=history_samples or samples, precision=precision, record=record, seed=seed,
            level=level, last=first + epochs,
        )  # fmt: skip
        with state.using(optimizer, ranks):
            hooks.start(state)
            while state.epoch < first + epochs:
                state.next_epoch(loop.train_epoch())
                hooks.epoch_ended(state)
    return [row for row in state.history if row["epoch"] > first]


@dataclass
class _Loop:
    """One level's training: its parts and its options, each of which is an argument of :func:`train`."""

    model: BayesianNetwork
    guide: AutoGuide
    data: Data
    likelihood: Any
    elbo: ELBO
    optimizer: Adam
    state: TrainState
    hooks: Hooks
    ranks: Ranks
    rates: tuple[float, tuple[int, ...], int]
    kl_warmup_epochs: int
    batch_size: int
    samples: int
    history_samples: int
    precision: str
    record: Record | None
    seed: int
    level: int
    last: int
    """The epoch before which training ends."""

    def __post_init__(self) -> None:
        device, recorded = self.data.train.device, self.record is not None
        self.rate: float = self.rates[0]
        # A graph reads it from the GPU; so do all steps there, or the graph's last bits would be others.
        self.rate_there = torch.tensor(self.rate, device=device) if recorded or device.type == "cuda" else None
        self.take: Take = self._take
        if self.record is not None:
            self.take = Steps(self._take, self.optimizer, self._changed, self._facts, self.record)
        self.parameters: list[Tensor] = [*self.guide.parameters(), *self.model.parameters()]
        self.buffers = list(self.model.buffers())
        self.norms: list[Any] = [m for m in self.model.modules() if is_batch_norm(m) and m.running_mean is not None]
        self.infinite = infinite_buffers(self.model)
        self.unsaved: dict[str, tuple[Tensor, int]] | None = {
            f"{path}.{name}".removeprefix("."): (buffer, buffer._version)
            for path, module in self.model.net.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
            and not buffer.is_inference()
            and name in module._non_persistent_buffers_set
            and not name.endswith("_init")
        }

    def train_epoch(self) -> dict[str, float]:
        """Train the rest of the epoch; returns its row."""
        state, began = self.state, time.perf_counter() - self.state.seconds
        factor = kl_factor(state.epoch, self.kl_warmup_epochs)
        with epoch(
            self.model, self.data, state, batch_size=self.batch_size, samples=self.samples, seed=self.seed,
            level=self.level, ranks=self.ranks,
        ) as batches:  # fmt: skip
            while state.step < len(batches):
                self._set_rate(len(batches))
                own, done, steps = family(self.guide), state.epoch * len(batches) + state.step, self.last * len(batches)
                own.step_begins(self.optimizer, self.model, done, steps)
                with TURN:  # a thread that predicts meanwhile waits for the step's end
                    x, y = batches.batch(state.step)
                    if isinstance(batches, StreamEpoch):
                        check_batch(self.model, self.likelihood, y)
                    self.take(x, y, factor, state.sums)
                self._warn_of_unsaved()
                state.step += 1
                own.step_ended(done + 1, steps)
                state.seconds = time.perf_counter() - began
                seen = self._check_or_stop(batches)
        seconds = time.perf_counter() - began
        return row_of(state.epoch, seen, len(batches), self.model, factor, self.rate, seconds) | self._of_other_splits()

    def _warn_of_unsaved(self) -> None:
        """After the first step, warn of buffers that it changed and that no file will hold."""
        if self.unsaved is None:
            return
        for name, (buffer, version) in self.unsaved.items():
            now = self.model.net.get_buffer(name)
            if now is not buffer or now._version != version:
                warnings.warn(
                    f"buffer {name!r} changes in training but is not persistent, so no file holds it, and what is loaded, resumed or rewound may be "
                    "another network; register it with persistent=True",
                    stacklevel=4,
                )
        self.unsaved = None

    def _take(self, x: Any, y: Tensor, factor: float, sums: Tensor) -> None:
        step(
            self.model, self.guide, self.elbo, self.optimizer, x, y, samples=self.samples, precision=self.precision,
            kl_factor=factor, sums=sums, ranks=self.ranks,
        )  # fmt: skip

    def _changed(self) -> list[list[Tensor]]:
        """The tensors that a step changes, beside the sums: parameters, buffers and Adam's moments."""
        return [
            self.parameters,
            self.buffers,
            [value for own in self.optimizer.state.values() for value in own.values()],
        ]

    def _facts(self) -> tuple[object, ...]:
        """What hooks may change meanwhile, beside tensors, and a step depends on."""
        sampling = getattr(self.optimizer, "noise", None)
        return self.model.kl_temperature, self.model.num_data, self.model.training, self.model.prior_ids(), sampling

    def _set_rate(self, steps: int) -> None:
        self.rate = learning_rate(self.state.epoch, self.state.step, steps, *self.rates)
        rate = self.rate if self.rate_there is None else self.rate_there.fill_(self.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _check_or_stop(self, batches: Epoch | StreamEpoch) -> Tensor:
        """After a step: check the epoch's sums if it is time to, and stop if the hooks ask to.

        Returns the sums; at an epoch's end they are those of all ranks.
        """
        state, ranks, seen = self.state, self.ranks, self.state.sums
        last = state.step == len(batches)
        checking = last or state.step % (CHECK_EVERY if ranks.world == 1 else AGREE_EVERY) == 0
        stopping = not (last or batches.whole_only) and (checking or ranks.world == 1)
        stopping = stopping and ranks.any(self.hooks.stopping())
        if checking or stopping:
            # Averaged now, so that what a stop saves of one rank is what all have.
            ranks.mean_(b for m in self.norms for b in (m.running_mean, m.running_var))
            seen = ranks.collect_(state.sums)
            # Before a checkpoint, which must not hold a diverged state.
            check_finite(seen, state, self.model, self.guide, self.infinite)
            nll = float(seen[NLL] / seen[EXAMPLES])
            self.hooks.progress(state, len(batches), nll, measured(self.model, seen))
        if stopping:
            self.hooks.stop(state)
        return seen

    def _of_other_splits(self) -> dict[str, float]:
        """The accuracy, or RMSE, of the test and validation splits."""
        row, device = {}, self.data.train.device
        for name, split in (("test", self.data.test), ("val", self.data.val)):
            if split is not None:
                with TURN, seeds.rng(device, self.seed, f"history-{name}", self.level, self.state.epoch):
                    found = measure_of(self.model, self.guide, split, self.history_samples, self.precision)
                    row[f"{name}_{measure_name(self.model)}"] = found
        return row
