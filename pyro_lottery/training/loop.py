"""One level's training: SVI on one mask from one starting point, as an epoch loop that can stop and go on anywhere."""

from __future__ import annotations

import time
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from torch.optim import Adam

from pyro_lottery import guides, seeds
from pyro_lottery.data import Data, StreamEpoch, stream_of
from pyro_lottery.distributed import ALONE, Alone
from pyro_lottery.elbo import ELBO
from pyro_lottery.machine import channels_last_
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.threads import TURN, in_one_thread
from pyro_lottery.training.checks import (
    check_batch,
    check_batches,
    check_counts,
    check_data,
    check_finite,
    check_rates,
    infinite_buffers,
    is_batch_norm,
)
from pyro_lottery.training.epoch import batches_of, training_mode
from pyro_lottery.training.history import History, measure, measured, row_of, score
from pyro_lottery.training.hooks import Hooks
from pyro_lottery.training.schedule import kl_factor, learning_rate
from pyro_lottery.training.state import Progress, TrainState, generators_of, set_generators
from pyro_lottery.training.step import EXAMPLES, NLL, step
from pyro_lottery.training.used_weights import check_used_weights

CHECK_EVERY = 50
"""Steps between two looks at the loss: the only moments at which a GPU is waited for within an epoch."""


AGREE_EVERY = 10
"""The same for several ranks, which may stop then alone, all at the same step."""


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
    seed: int = 0,
    level: int = 0,
    state: TrainState | None = None,
    hooks: Hooks | None = None,
    ranks: Alone = ALONE,
) -> History:
    """Train ``guide`` and the network's own parameters by Adam on the ELBO (paper §3, §4); returns one row an epoch.

    ``data`` is a :class:`Data`, or a bare loader of (x, y) batches, then without test columns: see
    :func:`pyro_lottery.data.from_loaders`. A loader makes its own batches, whatever ``batch_size`` says, and a training on one
    stops and goes on at the ends of epochs alone. Minimised per example: nll + kl·T/N, averaged over ``train_samples`` noise samples a batch; ``estimator`` says whether
    they are of the weights or of what layers compute (see :class:`ELBO`). T is the model's ``kl_temperature``, times
    :func:`kl_factor` over the first ``kl_warmup_epochs``; ``kl_weight`` is their product over N. A row holds
    ``epoch`` (from 1), ``loss = nll + kl_weight·kl`` in nats (``nll`` per example, ``kl`` whole), ``train_accuracy``,
    ``test_accuracy`` and, with a validation split, ``val_accuracy`` from ``history_samples`` posterior samples
    (default: ``train_samples``), ``lr`` and ``seconds`` of training. Where targets are no classes, ``rmse`` takes the place
    of ``accuracy``: NaN for a likelihood without a mean. Prune with
    :func:`pyro_lottery.handlers.sparsify` around the call. On a processor, large networks train quicker in a process that
    keeps the memory it frees (:func:`pyro_lottery.machine.keep_memory`), as the commands' do.

    All randomness follows ``(seed, level, epoch)``: a second call draws the same batches and noise again, unless it is
    told where it goes on. To train in several calls, give all of them one :class:`TrainState`: each trains ``epochs``
    more, from ``state.epoch`` on, with Adam's moments, and the bits are those of one call of all epochs. Milestones and
    warm-up count from epoch 0. Several ``ranks`` take a part of each batch each, or all of it, with weight noise of
    their own, and average their gradients.

    Raises ``Diverged``, with epoch, step and sites, when a loss or a parameter is not finite, and ``UserError`` before
    the first step if the guide is of another model, the state of another training, or the data do not suit the network and its
    likelihood.
    """
    check_counts(0, epochs=epochs, warmup_epochs=warmup_epochs, kl_warmup_epochs=kl_warmup_epochs)
    check_counts(1, batch_size=batch_size, train_samples=train_samples, history_samples=history_samples or 1)
    check_rates(lr=lr, weight_decay=weight_decay)
    guides.check_guide(guide)
    guides.check_sites(model, guide)
    device = next(iter(guide.parameters())).device
    if not isinstance(data, Data):
        data = Data(stream_of(data, "the loader", otherwise=model.num_data), None, None, None, "none", 0)
    data = data.to(device)
    likelihood = check_data(model, data)
    check_batches(model, data, batch_size, ranks)
    hooks, state = hooks or Hooks(), state or TrainState()
    state.check(model, guide)
    last_epoch = state.epoch + epochs
    samples = 1 if guides.is_point(guide) else train_samples
    channels_last_(model)
    check_used_weights(model, data.train.head()[0])
    norms: list[Any] = [m for m in model.modules() if is_batch_norm(m) and m.running_mean is not None]
    infinite = infinite_buffers(model)
    with guides.compressed(guide):  # the parameters are those of surviving weights, so is the optimizer's state
        optimizer = Adam(guides.parameter_groups(model, guide, weight_decay), lr, fused=True)
        state.load(optimizer)
        progress = hooks.start(optimizer) or Progress(state.epoch)
        elbo = ELBO(kl, estimator="weights" if guides.is_point(guide) else estimator)

        while progress.epoch < last_epoch:
            began = time.perf_counter() - progress.seconds
            order = seeds.generator(device, seed, "batches", level, progress.epoch)
            factor = kl_factor(progress.epoch, kl_warmup_epochs)
            with (
                seeds.stream(device, seed, "noise", level, progress.epoch, *ranks.path),
                pyro.validation_enabled(False),
                training_mode(model, samples),
                batches_of(data, batch_size, order, ranks.least, (seed, level, progress.epoch)) as batches,
            ):
                set_generators(progress.generators, order, device, ranks)
                sums = progress.sums.to(device) * (ranks.rank == 0)
                while progress.step < len(batches):
                    rate = learning_rate(progress.epoch, progress.step, len(batches), lr, milestones, warmup_epochs)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    with TURN:  # a thread that predicts meanwhile waits for the step's end
                        # All ranks draw the augmentation of the whole batch, so that it is that of one process.
                        x, y = batches.batch(progress.step)
                        if isinstance(batches, StreamEpoch):
                            check_batch(model, likelihood, y)
                        step(
                            model, guide, elbo, optimizer, x, y, samples=samples, precision=precision, kl_factor=factor,
                            sums=sums, ranks=ranks,
                        )  # fmt: skip
                    progress.step += 1
                    progress.seconds = time.perf_counter() - began
                    last = progress.step == len(batches)
                    checking = last or progress.step % (CHECK_EVERY if ranks.world == 1 else AGREE_EVERY) == 0
                    stopping = not (last or batches.whole_only) and (checking or ranks.world == 1)
                    stopping = stopping and ranks.any(hooks.stopping())
                    if checking or stopping:
                        # Of each rank's part; now, so that what a stop saves of one rank is what all have.
                        ranks.mean_(b for m in norms for b in (m.running_mean, m.running_var))
                        seen = ranks.collect_(sums)
                        # Before a checkpoint, which must not hold a diverged state.
                        check_finite(seen, progress, model, guide, infinite)
                        hooks.check(progress, len(batches), float(seen[NLL] / seen[EXAMPLES]), measured(model, seen))
                    if stopping:
                        progress.sums, progress.generators = seen, generators_of(order, device, ranks)
                        hooks.stop(progress, optimizer)
                batches.end()
            row = row_of(progress.epoch, seen, len(batches), model, factor, rate, time.perf_counter() - began)
            for name, split in (("test", data.test), ("val", data.val)):
                if split is not None:
                    with TURN, seeds.stream(device, seed, f"history-{name}", level, progress.epoch):
                        row[f"{name}_{measure(model)}"] = score(
                            model, guide, split, history_samples or samples, precision
                        )
            progress = Progress(progress.epoch + 1, history=[*progress.history, row])
            state.move_on(progress.epoch, optimizer)
            hooks.epoch(progress, optimizer)
        return progress.history
