"""Checks of options, data and batches before the first step, and checks for finite values after it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_lottery import guides, seeds, trees
from pyro_lottery.data import Data, Split, Stream, stream_of
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.distributions import base
from pyro_lottery.errors import Diverged, UserError, one_line
from pyro_lottery.machine import channels_last
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.modes import inference
from pyro_lottery.training.state import TrainState
from pyro_lottery.training.step import FINITE_STEPS, TALLY
from pyro_lottery.types import Sites

_REMEDY = "try a lower --lr, a smaller --init-scale or --precision 32"


def check_rates(**rates: Any) -> None:
    """Raise ``UserError`` for a value that is not a finite number of at least 0."""
    for name, value in rates.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{name} must be a finite number, at least 0, got {value!r}")


def as_data(model: BayesianNetwork, guide: AutoGuide, data: Any) -> Data:
    """``data``, or a bare loader of (x, y) batches, as data on the device of ``guide``."""
    if not isinstance(data, Data):
        data = Data(stream_of(data, "the loader", otherwise=model.num_data), None, None, None, "none", 0)
    return data.to(next(iter(guide.parameters())).device)


def check_data(model: BayesianNetwork, data: Data) -> Any:
    """Raise a one-line ``UserError`` for data that do not suit the network, its likelihood or its ``num_data``.

    Runs the network on two examples of each split, and checks all targets that are held in memory. Returns the likelihood of
    two training examples.
    """
    for name, module in model.net.named_modules():
        if getattr(module, "sparse", False) is True:  # nn.Embedding, nn.EmbeddingBag
            raise UserError(f"{name!r} gives sparse gradients, which Adam does not take; build it with sparse=False")
    if model.num_data != len(data.train):
        raise UserError(
            f"the model's num_data is {model.num_data}, but there are {len(data.train)} training examples; make them equal"
        )
    likelihoods: list[Any] = []
    for part, split in (("training", data.train), ("test", data.test), ("validation", data.val)):
        if split is None:
            continue
        x, y = split.head()
        output = _run_once(model, x, first=not likelihoods)
        with pyro.validation_enabled(False):  # training reports what is not finite
            likelihoods.append(model.checked_likelihood(output, len(output)))
        y = model.checked_targets(y, likelihoods[-1], output)
        _check_targets(likelihoods[-1], split.targets if isinstance(split, Split) else y, part)
    return likelihoods[0]


class _Names(Messenger):
    """The names of the sites that are sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        self.names.add(msg["name"])


def _run_once(model: BayesianNetwork, x: Any, first: bool) -> Tensor:
    before = {name for name, _ in model.net.named_parameters()}
    try:
        with (
            seeds.rng("cpu", 0, "try out"),
            inference(model),
            _Names() as met,
            poutine.condition(data=dict(model.initial_values())),
        ):
            output = model.outputs(trees.map_tensors(channels_last, x))
    except UserError:
        raise
    except Exception as error:  # networks raise anything for inputs that they cannot take
        raise UserError(f"the network cannot take inputs of {trees.shapes(x)}: {one_line(error)}") from error
    if new := [name for name, _ in model.net.named_parameters() if name not in before]:
        raise UserError(
            f"the network makes {new[0]!r} at its first call, too late for a prior; call it once on an input before you give it"
        )
    if first:
        _check_use(model, met.names)
    return output


def _check_use(model: BayesianNetwork, used: set[str]) -> None:
    """Raise ``UserError`` if the network uses none of its random weights, and warn if it leaves some that can be pruned unused."""
    if not used.intersection(model.sites):
        raise UserError(
            "the network computes with none of its random weights: a function that was made in __init__, such as a lambda, keeps the layers of the "
            "network that was copied; call layers as self.layer in forward"
        )
    if unused := [site for site in model.prunable if site not in used]:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warnings.warn(
            f"{unused[0]!r}{more} can be pruned, but a pass in evaluation mode does not use it: what is never used takes up a part of every density; "
            "remove such layers",
            stacklevel=3,
        )


def _check_targets(likelihood: Any, targets: Tensor, part: str) -> None:
    try:
        fine = likelihood.support.check(targets)
    except (NotImplementedError, RuntimeError):  # the distribution has no support, or one per example
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


def check_batch(model: BayesianNetwork, likelihood: Any, y: Tensor) -> None:
    """Raise ``UserError`` for a batch of a stream that has one example, or targets outside the likelihood's support."""
    if len(y) == 1 and any(is_batch_norm(m) for m in model.modules()):
        raise UserError(
            "the loader gave a batch of one example, which BatchNorm cannot normalise; let it drop such a batch"
        )
    if y.device.type == "cpu":  # reading from a GPU would wait for it
        _check_targets(likelihood, y, "training")


def check_batches(model: nn.Module, data: Data, batch_size: int, ranks: Ranks = ALONE) -> None:
    """Raise a one-line ``UserError`` for batches on which the network cannot be trained, or if torch's gradients are off."""
    if not torch.is_grad_enabled():
        raise UserError("training needs gradients; call it outside torch.no_grad() and torch.inference_mode()")
    if isinstance(data.train, Stream):
        _check_stream(model, data.train, ranks)
        return
    if min(batch_size, len(data.train)) < ranks.least and ranks.world > 1:
        raise UserError(f"--batch-size and --train-size must be at least {ranks.least}: each device needs two images")
    if min(batch_size, len(data.train)) < 2 and any(is_batch_norm(m) for m in model.modules()):
        raise UserError("--batch-size and --train-size must be at least 2: BatchNorm cannot normalise a batch of one")


def _check_stream(model: nn.Module, stream: Stream, ranks: Ranks) -> None:
    if ranks.world > 1:
        raise UserError(
            "a loader's data cannot be shared by several devices; use one device, or hold the data in memory: pl.data.from_tensors"
        )
    if stream.last_batch == 1 and any(is_batch_norm(m) for m in model.modules()):
        raise UserError(
            "the loader's last batch has one example, which BatchNorm cannot normalise; give the DataLoader drop_last=True, or "
            "another batch_size"
        )


def infinite_buffers(model: nn.Module) -> Sites:
    """Copies of the buffers that hold infinite numbers before the first step, such as attention masks."""
    statistics = {name for name, m in model.named_modules() if is_batch_norm(m)}  # infinite only after divergence
    return {
        name: value.clone()
        for name, value in model.named_buffers()
        if name.rpartition(".")[0] not in statistics and bool(value.isinf().any())
    }


def check_finite(sums: Tensor, state: TrainState, model: nn.Module, guide: AutoGuide, infinite: Sites) -> None:
    """Raise ``Diverged`` for a loss, a parameter or a buffer that is not finite, with the first such step.

    Buffers in ``infinite`` may keep their infinite numbers.
    """

    def fine(name: str, value: Tensor) -> bool:
        kept = name in infinite and bool((value.isfinite() | (value == infinite[name])).all())
        return kept or bool(value.isfinite().all())

    values = [*guide.parameters(), *(v for name, v in model.state_dict().items() if name not in infinite)]
    if not infinite and _norms_are_finite([sums[:TALLY], *values]):
        return
    finite = bool(sums[:TALLY].isfinite().all())
    parameters_finite = all(bool(p.isfinite().all()) for p in guide.parameters())
    if finite and parameters_finite and all(fine(*item) for item in model.state_dict().items()):
        return
    what, step = ("a parameter", state.step) if finite else ("the loss", int(sums[FINITE_STEPS]) + 1)
    sites = guides.not_finite(guide)
    named = (*model.named_parameters(), *model.named_buffers())
    sites += [name for name, p in named if name not in sites and not fine(name, p)]
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    where = f" (not finite by then: {', '.join(sites[:3])}{more})" if sites else ""
    epoch = state.epoch + 1
    raise Diverged(f"{what} is not finite at epoch {epoch}, step {step}{where}; {_REMEDY}", epoch, step, sites)


@torch.no_grad()
def _norms_are_finite(values: Sequence[Tensor]) -> bool:
    """Whether no value is infinite or NaN, found in one answer from a GPU; False also if a norm is too large for float32."""
    norms = torch._foreach_norm([v for v in values if v.is_floating_point() and v.numel()])
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm of any number of dimensions."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
