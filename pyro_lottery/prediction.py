"""What draws of the weights, or the mean weights, say of inputs: expectations, and whole predictives."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery import guides, metrics, seeds, trees
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.handlers import active_mask
from pyro_lottery.machine import autocast, channels_last
from pyro_lottery.masks import zeroed
from pyro_lottery.model import BayesianClassifier, BayesianNetwork
from pyro_lottery.model.inputs import batches, is_loader, slices
from pyro_lottery.model.likelihoods import Mixture
from pyro_lottery.modes import evaluating
from pyro_lottery.threads import TURN

BATCH = 500
"""Examples that are predicted at once, unless told."""
Inputs = Any
"""What is predicted: a tensor or numpy array [n, ...], a tuple, list or mapping of them as the network takes it, a
:class:`pyro_lottery.data.Split`, or a loader: any other iterable, of batches x or (x, y)."""
_Batches = Callable[[], Iterator[Any]]
"""Inputs batch by batch, once for every draw of the weights."""
_Result = TypeVar("_Result")


def predict(
    model: BayesianNetwork,
    guide: AutoGuide,
    x: Inputs,
    num_samples: int = 10,
    *,
    batch_size: int = BATCH,
    precision: str = "32",
    aggregate: bool = True,
) -> Tensor:
    """E[y | x] averaged over ``num_samples`` draws of the weights (paper §3): of a classifier the classes' probabilities
    [n, classes], of others the likelihood's mean [n, ...], NaN where it has none.

    With ``aggregate=False`` that of every draw, [samples, n, ...]; their mean is the average but for rounding.
    Every draw is used for all inputs. A loader is read once, in its own batches, under the draws that a tensor would
    meet; one that shuffles is refused. Buffers, training mode and gradients are left as they were. Draws follow
    torch's global generator; a point guide takes one sample whatever is asked for. Raises ``UserError`` if the guide is
    of another model, whose sites or shapes differ. Threads take turns, prediction by prediction.
    """

    def of_part(part: _Batches, replay: seeds.Replay | None) -> Tensor:
        draws = _draws(model, guide, part, num_samples, precision, model.expected, replay)
        if not aggregate:
            return torch.stack(list(draws))
        total: Any = 0.0
        for count, expected in enumerate(draws, 1):  # noqa: B007
            total = total + expected
        return total / count

    with TURN:
        _check(model, guide, num_samples)
        return _joined(_of_parts(model, x, batch_size, of_part), 0 if aggregate else 1)


@dataclass(frozen=True, eq=False)
class Predictive:
    """What draws of the weights say of images: class probabilities, and how much of their entropy is of which kind."""

    probs: Tensor
    """Softmax averaged over draws, p̄ [n, classes]."""
    aleatoric: Tensor
    """Mean entropy of a draw's softmax [n], in nats: what the data leave open whatever the weights."""
    num_samples: int

    @property
    def total(self) -> Tensor:
        """Entropy of p̄ [n], in nats: aleatoric + epistemic."""
        return metrics.entropy(self.probs)

    @property
    def epistemic(self) -> Tensor:
        """total − aleatoric [n]: the mutual information of label and weights, at least 0."""
        return self.total - self.aleatoric


def predictive(
    model: BayesianNetwork,
    guide: AutoGuide,
    x: Inputs,
    num_samples: int = 10,
    *,
    batch_size: int = BATCH,
    precision: str = "32",
) -> Predictive | Mixture:
    """What ``num_samples`` draws of the weights, drawn as by :func:`predict`, say of ``x``: of a classifier a
    :class:`Predictive`, of others a :class:`Mixture`, which holds the network's outputs of all draws.
    """

    def of_classes(part: _Batches, replay: seeds.Replay | None) -> Predictive:
        return last(_running(_draws(model, guide, part, num_samples, precision, model.expected, replay)))

    def of_outputs(part: _Batches, replay: seeds.Replay | None) -> Tensor:
        return torch.stack(list(_draws(model, guide, part, num_samples, precision, lambda output: output, replay)))

    with TURN:
        _check(model, guide, num_samples)
        if isinstance(model, BayesianClassifier):
            found = _of_parts(model, x, batch_size, of_classes)
            probs, aleatoric = (_joined([getattr(each, name) for each in found]) for name in ("probs", "aleatoric"))
            return Predictive(probs, aleatoric, found[0].num_samples)
        outputs = _joined(_of_parts(model, x, batch_size, of_outputs), 1)
        with inference(model):  # copied, since a learned scale is the model's own, which goes on training
            likelihoods = copy.deepcopy([model.checked_likelihood(output, len(output)) for output in outputs])
        return Mixture(tuple(likelihoods), outputs.new_empty(0))


def predictives(
    model: BayesianNetwork,
    guide: AutoGuide,
    x: Inputs,
    num_samples: int = 10,
    *,
    batch_size: int = BATCH,
    precision: str = "32",
) -> Iterator[Predictive]:
    """A classifier's predictive from 1, 2, ... ``num_samples`` draws of the weights, as :func:`predict` draws them; memory
    does not grow with their number. Threads take turns, draw by draw. Inputs must be held in memory.
    """
    if not isinstance(model, BayesianClassifier) or is_loader(x):
        raise UserError("predictives are a classifier's, of inputs held in memory; use pl.predictive")
    _check(model, guide, num_samples)
    device = _device(model)
    yield from _running(
        _draws(model, guide, lambda: slices(x, batch_size, device), num_samples, precision, model.expected)
    )


def _running(draws: Iterator[Tensor]) -> Iterator[Predictive]:
    total: Any = 0.0
    entropies: Any = 0.0
    for count, probs in enumerate(draws, 1):
        total, entropies = total + probs, entropies + metrics.entropy(probs)
        yield Predictive(total / count, entropies / count, count)


def last(every: Iterator[Predictive]) -> Predictive:
    """The predictive from all draws, without keeping those from fewer."""
    return deque(every, maxlen=1).pop()


def _check(model: BayesianNetwork, guide: AutoGuide, num_samples: int) -> None:
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}; predict_mean uses the mean weights")
    with TURN:
        guides.check_sites(model, guide)


def _of_parts(
    model: BayesianNetwork, x: Inputs, batch_size: int, f: Callable[[_Batches, seeds.Replay | None], _Result]
) -> list[_Result]:
    """``f`` of inputs held in memory, or of every batch of a loader; it gets the same random numbers for each of them, while
    the loader goes on with torch's own.
    """
    device = _device(model)
    if not is_loader(x):
        return [f(lambda: slices(x, batch_size, device), None)]
    replay, found = seeds.Replay(device), []
    for batch in batches(x, device):
        with replay:
            found.append(f(lambda: iter([batch]), replay))  # noqa: B023
    replay.keep()
    return found


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _device(model: BayesianNetwork) -> torch.device:
    return next(iter(model.initial_values().values())).device


def _draws(
    model: BayesianNetwork,
    guide: AutoGuide,
    inputs: _Batches,
    num_samples: int,
    precision: str,
    of: Callable[[Tensor], Tensor],
    replay: seeds.Replay | None = None,
) -> Iterator[Tensor]:
    """``of`` the network's outputs [n, ...] under one draw of the weights after the other."""
    for number in range(1 if guides.is_point(guide) else num_samples):
        with inference(model):
            if replay:
                replay.mark(number)
            trace = poutine.trace(guide).get_trace()
            weights: dict[str, Any] = {
                name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"
            }
            found = torch.cat([of(output) for output in _outputs(model, weights, inputs(), precision)])
        yield found


def predict_mean(
    model: BayesianNetwork, guide: AutoGuide, x: Inputs, *, batch_size: int = BATCH, precision: str = "32"
) -> Tensor:
    """E[y | x] [n, ...] of the network whose weights are the posterior's locs, as of :func:`predict`: one pass, no
    randomness.
    """
    outputs = logits_mean(model, guide, x, batch_size=batch_size, precision=precision)
    with inference(model):
        return model.expected(outputs)


def logits_mean(
    model: BayesianNetwork, guide: AutoGuide, x: Inputs, *, batch_size: int = BATCH, precision: str = "32"
) -> Tensor:
    """Outputs [n, ...] of the network whose weights are the posterior's locs (0 where ``sparsify`` prunes)."""
    with TURN:
        guides.check_guide(guide)
        guides.check_sites(model, guide)
        weights: dict[str, Tensor] = {}
        for name, loc in guides.values_at_loc(guide).items():
            weights[name] = zeroed(loc, active_mask(name, loc.shape))
        device = _device(model)
        parts = batches(x, device) if is_loader(x) else slices(x, batch_size, device)
        with inference(model):
            return torch.cat(list(_outputs(model, weights, parts, precision)))


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients and Pyro's validation, and without other threads; all as it was afterwards."""
    with TURN, evaluating(model), torch.no_grad(), pyro.validation_enabled(False):
        yield


def _outputs(
    model: BayesianNetwork, weights: Mapping[str, Tensor], inputs: Iterator[Any], precision: str
) -> Iterator[Tensor]:
    for batch in inputs:
        first = trees.first_tensor(batch)
        with poutine.condition(data=dict(weights)), autocast(first.device, precision):
            try:
                output = model.outputs(trees.map_tensors(channels_last, batch))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UserError(_refusal(batch, error)) from error
            yield output


def _refusal(batch: Any, error: RuntimeError) -> str:
    """Why the network cannot take a batch, in one line."""
    said = f"the network cannot take {trees.shapes(batch)} inputs ({one_line(error)})"
    if trees.first_tensor(batch).is_floating_point():
        return said
    return f"{said}; give a split, as data.test, or normalised ones, data.test.normalize(x)"
