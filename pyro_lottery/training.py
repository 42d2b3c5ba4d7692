"""One level's training: SVI on one mask from one starting point, as an epoch loop that can stop and go on anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.optim import Adam

from pyro_lottery import guides, metrics, seeds, trees
from pyro_lottery.data import Data, Epoch, Split, Stream, StreamEpoch, recorded, stream_of
from pyro_lottery.distributed import ALONE, Alone
from pyro_lottery.distributions import base
from pyro_lottery.elbo import ELBO
from pyro_lottery.errors import Diverged, UserError, one_line
from pyro_lottery.machine import autocast, channels_last, channels_last_
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.prediction import inference, predict
from pyro_lottery.priors import SitePrior
from pyro_lottery.threads import TURN, in_one_thread
from pyro_lottery.types import Sites
from pyro_lottery.used_weights import check_used_weights

History = list[dict[str, float]]
CHECK_EVERY = 50
"""Steps between two looks at the loss: the only moments at which a GPU is waited for within an epoch."""
AGREE_EVERY = 10
"""The same for several ranks, which may stop then alone, all at the same step."""
_REMEDY = "try a lower --lr, a smaller --init-scale or --precision 32"
NLL, KL, TALLY, EXAMPLES, FINITE_STEPS = range(5)
COLUMNS = ("epoch", "loss", "nll", "kl", "kl_weight", "train_accuracy", "lr", "seconds")
"""Of a history, beside the accuracies of other splits."""


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


def kl_factor(epoch: int, kl_warmup_epochs: int) -> float:
    """What multiplies T·KL in ``epoch`` (from 0): (epoch + ½)/K over the first K epochs, a line from 0 to 1 taken at each
    epoch's middle, and then 1 (Sønderby et al. 2016, Ladder Variational Autoencoders).

    >>> [kl_factor(epoch, 2) for epoch in range(4)]
    [0.25, 0.75, 1.0, 1.0]
    """
    return (epoch + 0.5) / kl_warmup_epochs if epoch < kl_warmup_epochs else 1.0


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


class Hooks:
    """What a caller may do while a level trains; each method may be left as it is."""

    def start(self, optimizer: Adam) -> Progress | None:
        """Called before the first step; training goes on from a returned Progress whose states have been loaded."""

    def stopping(self) -> bool:
        """Asked after every step but an epoch's last; True leads to :meth:`stop`."""
        return False

    def stop(self, progress: Progress, optimizer: Adam) -> None:
        """Called within an epoch when :meth:`stopping` said so: save ``progress`` and raise."""

    def check(self, progress: Progress, steps: int, nll: float, measured: float) -> None:
        """Called every ``CHECK_EVERY`` steps and at an epoch's end with the epoch's nll so far, and its accuracy or RMSE."""

    def epoch(self, progress: Progress, optimizer: Adam) -> None:
        """Called after every epoch, when its row is in the history."""


def learning_rate(
    epoch: int, step: int, steps: int, lr: float, milestones: tuple[int, ...], warmup_epochs: int
) -> float:
    """lr × 0.1^(milestones passed), rising linearly over the first ``warmup_epochs`` (paper §4).

    >>> [learning_rate(epoch, 0, 10, 1.0, (2, 3), 0) for epoch in range(3)]
    [1.0, 1.0, 0.1]
    """
    value = lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    if epoch < warmup_epochs:
        value *= (epoch * steps + step + 1) / (warmup_epochs * steps)
    return value


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
    _check_counts(0, epochs=epochs, warmup_epochs=warmup_epochs, kl_warmup_epochs=kl_warmup_epochs)
    _check_counts(1, batch_size=batch_size, train_samples=train_samples, history_samples=history_samples or 1)
    _check_rates(lr=lr, weight_decay=weight_decay)
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
    norms: list[Any] = [m for m in model.modules() if _is_batch_norm(m) and m.running_mean is not None]
    infinite = _infinite_buffers(model)
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
                _training_mode(model, samples),
                _batches(data, batch_size, order, ranks.least, (seed, level, progress.epoch)) as batches,
            ):
                _set_generators(progress.generators, order, device, ranks)
                sums = progress.sums.to(device) * (ranks.rank == 0)
                while progress.step < len(batches):
                    rate = learning_rate(progress.epoch, progress.step, len(batches), lr, milestones, warmup_epochs)
                    with TURN:  # a thread that predicts meanwhile waits for the step's end
                        # All ranks draw the augmentation of the whole batch, so that it is that of one process.
                        x, y = batches.batch(progress.step)
                        count = len(y)
                        if isinstance(batches, StreamEpoch):
                            _check_batch(model, likelihood, y)
                        x, y = trees.map_tensors(lambda t: channels_last(ranks.share(t)), x), ranks.share(y)
                        share = len(y) * ranks.world / count if ranks.parallel == "data" else 1.0
                        _step(model, guide, elbo, optimizer, rate, x, y, samples, precision, sums, share, ranks, factor)
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
                        _check_finite(seen, progress, model, guide, infinite)
                        hooks.check(progress, len(batches), float(seen[NLL] / seen[EXAMPLES]), _measured(model, seen))
                    if stopping:
                        progress.sums, progress.generators = seen, _generators(order, device, ranks)
                        hooks.stop(progress, optimizer)
                batches.end()
            row = _row(progress.epoch, seen, len(batches), model, factor, rate, time.perf_counter() - began)
            for name, split in (("test", data.test), ("val", data.val)):
                if split is not None:
                    with TURN, seeds.stream(device, seed, f"history-{name}", level, progress.epoch):
                        row[f"{name}_{measure(model)}"] = _score(
                            model, guide, split, history_samples or samples, precision
                        )
            progress = Progress(progress.epoch + 1, history=[*progress.history, row])
            state.move_on(progress.epoch, optimizer)
            hooks.epoch(progress, optimizer)
        return progress.history


def _check_counts(least: int, **counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number, at least {least}, got {value!r}")


def _check_rates(**rates: Any) -> None:
    for name, value in rates.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{name} must be a finite number, at least 0, got {value!r}")


def steps_per_epoch(count: int, batch_size: int, least: int = 2) -> int:
    """Batches in an epoch of ``count`` examples: a rest of fewer than ``least`` joins the batch before it.

    >>> [steps_per_epoch(count, 4) for count in (1, 8, 9, 10)]
    [1, 2, 2, 3]
    """
    return max(1, count // batch_size + (count % batch_size >= least))


def steps_in(split: Split | Stream, batch_size: int, least: int = 2) -> int:
    """Batches in an epoch of ``split``."""
    return split.steps if isinstance(split, Stream) else steps_per_epoch(len(split), batch_size, least)


def measure(model: BayesianNetwork) -> str:
    """What tells how good predictions are, as columns of a history name it: ``accuracy`` or ``rmse``."""
    return "accuracy" if model.task == "classification" else "rmse"


def columns(model: BayesianNetwork) -> tuple[str, ...]:
    """The columns of a history, beside what is measured of other splits."""
    return tuple(name.replace("accuracy", measure(model)) for name in COLUMNS)


def check_data(model: BayesianNetwork, data: Data) -> Any:
    """Raise a one-line ``UserError`` for data that do not suit the network, its likelihood or its ``num_data``.

    Two examples of each split go through the network; targets that are held in memory are all looked at. Returns the likelihood
    of two training examples.
    """
    for name, module in model.net.named_modules():
        if getattr(module, "sparse", False) is True:  # nn.Embedding, nn.EmbeddingBag
            raise UserError(f"{name!r} gives sparse gradients, which Adam does not take; build it with sparse=False")
    if model.num_data != len(data.train):
        raise UserError(f"the model's num_data is {model.num_data}, but there are {len(data.train)} training examples")
    likelihoods = []
    for part, split in (("training", data.train), ("test", data.test), ("validation", data.val)):
        if split is None:
            continue
        x, y = split.head()
        output = _try_out(model, x)
        with pyro.validation_enabled(False):  # what is not finite is told by training
            likelihoods.append(model.checked_likelihood(output, len(output)))
        y = model.checked_targets(y, likelihoods[-1], output)
        _check_targets(likelihoods[-1], split.targets if isinstance(split, Split) else y, part)
    return likelihoods[0]


def _try_out(model: BayesianNetwork, x: Any) -> Tensor:
    try:
        with seeds.stream("cpu", 0, "try out"), inference(model), poutine.condition(data=dict(model.initial_values())):
            return model.outputs(trees.map_tensors(channels_last, x))
    except UserError:
        raise
    except Exception as error:  # whatever a network says of inputs that it cannot take
        raise UserError(f"the network cannot take inputs of {trees.shapes(x)}: {one_line(error)}") from error


def _check_targets(likelihood: Any, targets: Tensor, part: str) -> None:
    try:
        fine = likelihood.support.check(targets)
    except (NotImplementedError, RuntimeError):  # of a distribution without a support, or with one for each example
        return
    if bool(fine.all()):
        return
    own = base(likelihood)
    odd = targets[~fine.reshape(len(targets), -1).all(1)][0].reshape(-1)
    if isinstance(own, dist.Categorical):
        raise UserError(
            f"a label of the {part} set is {int(odd[0])}, but the network has {own.logits.shape[-1]} outputs: labels must be from 0 to "
            f"{own.logits.shape[-1] - 1}"
        )
    raise UserError(
        f"a target of the {part} set is {odd.tolist()[:3]}, which {type(own).__name__} cannot give: its support is {own.support}"
    )


def _check_batch(model: BayesianNetwork, likelihood: Any, y: Tensor) -> None:
    """Raise ``UserError`` for what shows only when a stream is read: a batch of one, or targets that no output can be of."""
    if len(y) == 1 and any(_is_batch_norm(m) for m in model.modules()):
        raise UserError(
            "the loader gave a batch of one example, which BatchNorm cannot normalise; let it drop such a batch"
        )
    if y.device.type == "cpu":  # a GPU would be waited for
        _check_targets(likelihood, y, "training")


@contextmanager
def _batches(
    data: Data, batch_size: int, order: torch.Generator, least: int, path: tuple[int, int, int]
) -> Iterator[Epoch | StreamEpoch]:
    """One epoch's batches, whose order follows ``order``, or of a stream ``path``: seed, level and epoch."""
    if isinstance(data.train, Split):
        yield Epoch(data.train, batch_size, data.augment, order, least)
        return
    with StreamEpoch(data.train, *path) as batches:
        yield batches


def check_batches(model: nn.Module, data: Data, batch_size: int, ranks: Alone = ALONE) -> None:
    """Raise a one-line ``UserError`` for batches that the network cannot be trained on."""
    if isinstance(data.train, Stream):
        _check_stream(model, data.train, ranks)
        return
    if min(batch_size, len(data.train)) < ranks.least and ranks.world > 1:
        raise UserError(f"--batch-size and --train-size must be at least {ranks.least}, two images a device")
    if min(batch_size, len(data.train)) < 2 and any(_is_batch_norm(m) for m in model.modules()):
        raise UserError("--batch-size and --train-size must be at least 2: BatchNorm cannot normalise a batch of one")


def _check_stream(model: nn.Module, stream: Stream, ranks: Alone) -> None:
    if ranks.world > 1:
        raise UserError("several devices share batches of data that are held in memory; train on one from a loader")
    if stream.last_batch == 1 and any(_is_batch_norm(m) for m in model.modules()):
        raise UserError(
            "the loader's last batch has one example, which BatchNorm cannot normalise; give the DataLoader drop_last=True, or "
            "another batch_size"
        )


def _step(
    model: BayesianNetwork,
    guide: AutoGuide,
    elbo: ELBO,
    optimizer: Adam,
    rate: float,
    x: Any,
    y: Tensor,
    samples: int,
    precision: str,
    sums: Tensor,
    share: float = 1.0,
    ranks: Alone = ALONE,
    factor: float = 1.0,
) -> None:
    """One step of Adam. ``share`` weighs the images of a rank that has more or fewer than the others, so that the mean of
    the ranks' gradients is the gradient of the whole batch. ``factor`` multiplies the KL, but not in ``sums``.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    for sample in range(samples):  # one backward pass a sample, so that memory does not grow with the samples
        with autocast(y.device, precision):
            terms = elbo.terms(model, guide, x, y, closed_forms=0 if sample else samples)
        ((share * terms.nll + factor * terms.kl) / (model.num_data * samples)).backward()
        with torch.no_grad():
            tally = model.tally(terms.output, y)
            nll = terms.nll * (len(y) / model.num_data)
            sums[:EXAMPLES] += torch.stack([nll, terms.kl / ranks.world, tally]).float() / samples
        del terms  # or its graph would live until the next sample's is complete
    ranks.mean_(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    optimizer.step()
    sums[EXAMPLES] += len(y)
    sums[FINITE_STEPS] += sums[:TALLY].isfinite().all() / ranks.world  # a likelihood may have no mean


def _infinite_buffers(model: nn.Module) -> Sites:
    """Copies of the buffers that hold infinite numbers before the first step, as attention masks do."""
    statistics = {name for name, m in model.named_modules() if _is_batch_norm(m)}  # infinite only after a divergence
    return {
        name: value.clone()
        for name, value in model.named_buffers()
        if name.rpartition(".")[0] not in statistics and bool(value.isinf().any())
    }


def _check_finite(sums: Tensor, progress: Progress, model: nn.Module, guide: AutoGuide, infinite: Sites) -> None:
    """Raise ``Diverged`` for a loss, a parameter or a buffer that is not finite, with the step that was the first.

    The buffers in ``infinite`` may keep their infinite numbers.
    """

    def fine(name: str, value: Tensor) -> bool:
        kept = name in infinite and bool((value.isfinite() | (value == infinite[name])).all())
        return kept or bool(value.isfinite().all())

    finite = bool(sums[:TALLY].isfinite().all())
    parameters_finite = all(bool(p.isfinite().all()) for p in guide.parameters())
    if finite and parameters_finite and all(fine(*item) for item in model.state_dict().items()):
        return
    what, step = ("a parameter", progress.step) if finite else ("the loss", int(sums[FINITE_STEPS]) + 1)
    sites = guides.not_finite(guide)
    named = (*model.named_parameters(), *model.named_buffers())
    sites += [name for name, p in named if name not in sites and not fine(name, p)]
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    where = f" (not finite by then: {', '.join(sites[:3])}{more})" if sites else ""
    epoch = progress.epoch + 1
    raise Diverged(f"{what} is not finite at epoch {epoch}, step {step}{where}; {_REMEDY}", epoch, step, sites)


def _row(
    epoch: int, sums: Tensor, steps: int, model: BayesianNetwork, factor: float, rate: float, seconds: float
) -> dict[str, float]:
    nll, kl = float(sums[NLL] / sums[EXAMPLES]), float(sums[KL]) / steps / model.kl_temperature
    weight = factor * model.kl_temperature / model.num_data
    values = (epoch + 1, nll + weight * kl, nll, kl, weight, _measured(model, sums), rate, seconds)
    return dict(zip(columns(model), values, strict=True))


def _measured(model: BayesianNetwork, sums: Tensor) -> float:
    found = float(sums[TALLY] / sums[EXAMPLES])
    return found if model.task == "classification" else found**0.5


def _score(model: BayesianNetwork, guide: AutoGuide, split: Split | Stream, samples: int, precision: str) -> float:
    given = recorded(split)
    found = predict(model, guide, given, samples, precision=precision)
    return (metrics.accuracy if model.task == "classification" else metrics.rmse)(found, given.targets)


def _generators(order: torch.Generator, device: torch.device, ranks: Alone) -> dict[str, Tensor]:
    noise = ranks.gather(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())
    return {"order": order.get_state()} | {noise_of(rank): state for rank, state in enumerate(noise)}


def noise_of(rank: int) -> str:
    """What the state of a rank's weight noise is called in a checkpoint."""
    return f"noise{rank or ''}"


def _set_generators(states: dict[str, Tensor], order: torch.Generator, device: torch.device, ranks: Alone) -> None:
    if states:
        order.set_state(states["order"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[noise_of(ranks.rank)], device)
        else:
            torch.set_rng_state(states[noise_of(ranks.rank)])


@contextmanager
def _training_mode(model: nn.Module, samples: int) -> Iterator[None]:
    """Training mode in which a batch weighs the same in BatchNorm's running statistics, however many weight samples
    it passes through: with momentum m and S passes, 1 − (1 − m)^(1/S) a pass makes m together.

    A network of which some modules are in training mode and others, a frozen BatchNorm say, are not keeps both as they are.
    """
    layers: list[Any] = [m for m in model.modules() if _is_batch_norm(m) and m.momentum]
    before = [layer.momentum for layer in layers]
    own = {m: m.training for m in model.modules() if not isinstance(m, BayesianNetwork | SitePrior)}
    model.train()
    if len(set(own.values())) == 2:
        for module, training in own.items():
            module.training = training
    for layer in layers:
        layer.momentum = 1 - (1 - layer.momentum) ** (1 / samples)
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
