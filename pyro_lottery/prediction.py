"""Predictions from posterior samples of the weights or from the mean weights: expectations and predictive distributions."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import guides, metrics, seeds, trees
from pyro_lottery.errors import UserError, check_counts, one_line
from pyro_lottery.handlers import active_mask, are_as_drawn, as_drawn
from pyro_lottery.machine import autocast, channels_last
from pyro_lottery.masks import zeroed
from pyro_lottery.model import BayesianClassifier, BayesianNetwork
from pyro_lottery.model.inputs import batches, is_loader, slices
from pyro_lottery.model.mask_check import warn_of_used_weights
from pyro_lottery.model.mixture import Mixture
from pyro_lottery.modes import inference
from pyro_lottery.threads import TURN
from pyro_lottery.types import Sites

BATCH = 500
"""Default number of examples per forward pass."""
SMALL, NUMBERS = 2_500, 2**23
"""Examples per forward pass on a GPU, which waits for Python between two passes, if they hold no more input numbers than this."""
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError)
"""What networks raise for inputs that they cannot take."""
Inputs = Any
"""Inputs: a tensor or numpy array [n, ...], a tuple, list or mapping of them as the network takes it, a
``pyro_lottery.data.Split``, or a loader, which is any other iterable of batches x or (x, y)."""
_Batches = Callable[[], Iterator[Any]]
"""Returns the inputs batch by batch; called once per draw of the weights."""
_Result = TypeVar("_Result")


def predict(
    model: BayesianNetwork,
    guide: AutoGuide,
    x: Inputs,
    num_samples: int = 10,
    *,
    batch_size: int | None = None,
    precision: str = "32",
    aggregate: bool = True,
) -> Tensor:
    """E[y | x] averaged over ``num_samples`` draws of the weights (paper §3).

    For a classifier these are the class probabilities [n, classes]; for other models the likelihood's mean [n, ...],
    which is NaN if the likelihood has none. With ``aggregate=False``, returns E[y | x, w] for each draw w,
    [samples, n, ...], whose mean equals the average up to rounding.

    ``x`` is a tensor or array [n, ...], a tuple, list or mapping of these, a split of a ``Data``, or a loader. Each draw is
    used for all inputs. A loader is read once, batch by batch, and gets the same draws as a tensor would. Draws use
    torch's global generator; a point guide uses one draw. Buffers, training mode and gradients stay as they were. If
    several threads predict, one waits until another's prediction is done.

    Raises ``UserError`` if the sites or shapes of the guide are not the model's, if the network cannot take the inputs,
    if a loader shuffles, or if ``num_samples`` or ``batch_size`` is less than 1. Warns if a layer computes with weights that
    the enclosing ``sparsify`` prunes, because the network transforms them.
    """

    def of_part(part: _Batches, replay: seeds.Replay | None) -> Tensor:
        draws = _draws(model, guide, part, num_samples, precision, model.expected, replay)
        if not aggregate:
            return torch.stack(list(draws))
        total: Any = 0.0
        for count, expected in enumerate(draws, 1):  # noqa: B007
            total = total + expected.double()  # in single precision a thousand draws would cost two digits
        return (total / count).to(expected.dtype)

    with TURN:
        _check(model, guide, num_samples)
        return _joined(_of_parts(model, guide, x, batch_size, of_part), 0 if aggregate else 1)


@dataclass(frozen=True, eq=False)
class Predictive:
    """A classifier's posterior predictive: class probabilities, and the aleatoric and epistemic parts of their entropy."""

    probs: Tensor
    """The softmax averaged over draws, p̄ [n, classes]."""
    aleatoric: Tensor
    """The mean entropy of a draw's softmax [n], in nats: uncertainty that remains for known weights."""
    num_samples: int
    """The number of draws."""

    @property
    def total(self) -> Tensor:
        """The entropy of p̄ [n], in nats: aleatoric + epistemic."""
        return metrics.entropy(self.probs)

    @property
    def epistemic(self) -> Tensor:
        """The mutual information of label and weights [n], in nats: total − aleatoric, and 0 within the rounding of the draws."""
        return metrics.mutual_information(self.total, self.aleatoric)


def predictive(
    model: BayesianNetwork,
    guide: AutoGuide,
    x: Inputs,
    num_samples: int = 10,
    *,
    batch_size: int | None = None,
    precision: str = "32",
) -> Predictive | Mixture:
    """The posterior predictive of ``x`` from ``num_samples`` draws of the weights, which are drawn as by ``predict``.

    For a classifier it is a ``Predictive`` with class probabilities [n, classes] and entropies [n]; for other models a
    ``Mixture`` with means, standard deviations and intervals [n, ...], which keeps the likelihoods of all draws. Raises
    ``UserError`` for the same reasons as ``predict``.
    """

    def of_classes(part: _Batches, replay: seeds.Replay | None) -> Predictive:
        return last(_running(_draws(model, guide, part, num_samples, precision, model.expected, replay)))

    def of_outputs(part: _Batches, replay: seeds.Replay | None) -> Tensor:
        return torch.stack(list(_draws(model, guide, part, num_samples, precision, lambda output: output, replay)))

    with TURN:
        _check(model, guide, num_samples)
        if isinstance(model, BayesianClassifier):
            found = _of_parts(model, guide, x, batch_size, of_classes)
            probs, aleatoric = (_joined([getattr(each, name) for each in found]) for name in ("probs", "aleatoric"))
            return Predictive(probs, aleatoric, found[0].num_samples)
        outputs = _joined(_of_parts(model, guide, x, batch_size, of_outputs), 1)
        with inference(model):  # copied, since a learned noise scale changes if the model trains on
            likelihoods = copy.deepcopy([model.checked_likelihood(output, len(output)) for output in outputs])
        return Mixture(tuple(likelihoods), outputs.new_empty(0))


def predictives(
    model: BayesianNetwork,
    guide: AutoGuide,
    x: Inputs,
    num_samples: int = 10,
    *,
    batch_size: int | None = None,
    precision: str = "32",
) -> Iterator[Predictive]:
    """Yield a classifier's predictive from 1, 2, ... ``num_samples`` draws of the weights, which are drawn as by ``predict``.

    Memory does not grow with the number of draws. Threads take turns after each draw. Raises ``UserError`` if the model is
    not a classifier, or if ``x`` is a loader.
    """
    if not isinstance(model, BayesianClassifier) or is_loader(x):
        raise UserError("predictives needs a classifier, and inputs held in memory; use pl.predictive")
    _check(model, guide, num_samples)
    device = _device(model)
    yield from _running(
        _draws(
            model,
            guide,
            lambda: slices(x, _batch(batch_size, device, x), device),
            num_samples,
            precision,
            model.expected,
        )
    )


def _running(draws: Iterator[Tensor]) -> Iterator[Predictive]:
    total: Any = 0.0
    entropies: Any = 0.0
    for count, probs in enumerate(draws, 1):
        total, entropies = total + probs.double(), entropies + metrics.entropy(probs)
        yield Predictive((total / count).to(probs.dtype), entropies / count, count)


def last(every: Iterator[Predictive]) -> Predictive:
    """The last predictive of ``every``, without keeping the others in memory."""
    return deque(every, maxlen=1).pop()


def _check(model: BayesianNetwork, guide: AutoGuide, num_samples: int) -> None:
    if num_samples == 0:
        raise UserError("num_samples must be at least 1, got 0; for the mean weights, use predict_mean")
    check_counts(1, num_samples=num_samples)
    with TURN:
        guides.check_sites(model, guide)


def _of_parts(
    model: BayesianNetwork,
    guide: AutoGuide,
    x: Inputs,
    batch_size: int | None,
    f: Callable[[_Batches, seeds.Replay | None], _Result],
) -> list[_Result]:
    """The results of ``f`` for inputs held in memory, or for every batch of a loader.

    ``f`` gets the same random numbers for each batch; the loader itself continues with torch's global generator.
    """
    device = _device(model)
    if not is_loader(x):
        with guides.drawn_from(guide):  # not around a loader, whose code may use the guide
            return [f(lambda: slices(x, _batch(batch_size, device, x), device), None)]
    replay, found = seeds.Replay(device), []
    for batch in batches(x, device):
        with replay:
            found.append(f(lambda: iter([batch]), replay))  # noqa: B023
    replay.keep()
    return found


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _batch(batch_size: int | None, device: torch.device, x: Any) -> int:
    if batch_size is not None or device.type == "cpu":
        return BATCH if batch_size is None else batch_size
    each = sum(t.numel() for t in trees.tensors(next(slices(x, 1, device))))
    return max(BATCH, min(SMALL, NUMBERS // max(1, each)))


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
    """Yield ``of(outputs)`` [n, ...] for one draw of the weights after another."""
    warn_of_used_weights(model, next(inputs()))
    for number in range(1 if guides.is_point(guide) else num_samples):
        with inference(model):
            if replay:
                replay.mark(number)
            found = torch.cat([of(output) for output in _outputs(model, _drawn(guide), inputs(), precision)])
        yield found


def drawn_weights(model: BayesianNetwork, guide: AutoGuide, num_samples: int) -> list[Sites]:
    """The weights of the draws that :func:`predict` would use: values by site, 0 where ``sparsify`` prunes."""
    with TURN, guides.drawn_from(guide), inference(model):
        _check(model, guide, num_samples)
        return [_used(model, _drawn(guide)) for _ in range(1 if guides.is_point(guide) else num_samples)]


def mean_weights(model: BayesianNetwork, guide: AutoGuide) -> Sites:
    """The weights of :func:`predict_mean`: the posterior's locs by site, 0 where ``sparsify`` prunes."""
    with TURN, inference(model):
        return _used(model, _locs(model, guide))


def _drawn(guide: AutoGuide) -> dict[str, Any]:
    trace = poutine.trace(guide).get_trace()
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


def _locs(model: BayesianNetwork, guide: AutoGuide) -> Sites:
    guides.check_guide(guide)
    guides.check_sites(model, guide)
    return {name: zeroed(loc, active_mask(name, loc.shape)) for name, loc in guides.values_at_loc(guide).items()}


def _used(model: BayesianNetwork, weights: Mapping[str, Tensor]) -> Sites:
    """``weights`` as the network uses them here: under the enclosing masks."""
    if are_as_drawn(weights):
        return weights
    with poutine.condition(data=dict(weights)), as_drawn():
        return model.sampled()


def predict_mean(
    model: BayesianNetwork, guide: AutoGuide, x: Inputs, *, batch_size: int | None = None, precision: str = "32"
) -> Tensor:
    """E[y | x] [n, ...] of the network with the posterior's locs as weights: one deterministic forward pass.

    ``x`` and the result are those of ``predict``. Raises ``UserError`` if the guide does not fit the model, or if the
    network cannot take the inputs.
    """
    outputs = logits_mean(model, guide, x, batch_size=batch_size, precision=precision)
    with inference(model):
        return model.expected(outputs)


def logits_mean(
    model: BayesianNetwork, guide: AutoGuide, x: Inputs, *, batch_size: int | None = None, precision: str = "32"
) -> Tensor:
    """The outputs [n, ...] of the network with the posterior's locs as weights (0 where ``sparsify`` prunes)."""
    with TURN:
        weights = _locs(model, guide)
        device = _device(model)
        parts = batches(x, device) if is_loader(x) else slices(x, _batch(batch_size, device, x), device)
        first = next(parts)
        warn_of_used_weights(model, first)
        with inference(model):
            return torch.cat(list(_outputs(model, weights, chain([first], parts), precision)))


def _outputs(
    model: BayesianNetwork, weights: Mapping[str, Tensor], inputs: Iterator[Any], precision: str
) -> Iterator[Tensor]:
    used = _used(model, weights)
    for batch in inputs:
        with poutine.condition(data=dict(weights)), as_drawn(), autocast(trees.first_tensor(batch).device, precision):
            try:
                with model.with_weights(used):
                    output = model.outputs(trees.map_tensors(channels_last, batch))
            except (UserError, torch.OutOfMemoryError):
                raise
            except _REFUSALS as error:
                raise UserError(_refusal(batch, error)) from error
            yield output


def _refusal(batch: Any, error: Exception) -> str:
    """The error message for a batch that the network cannot take."""
    said = f"the network cannot take {trees.shapes(batch)} inputs ({one_line(error)})"
    if trees.first_tensor(batch).is_floating_point():
        return said
    return f"{said}; pass a split, such as data.test, or normalised inputs, data.test.normalize(x)"
