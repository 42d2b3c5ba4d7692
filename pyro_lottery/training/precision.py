"""``--precision auto``: the precision in which a network's training steps are faster."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_lottery import seeds, trees
from pyro_lottery.data import Data, Stream
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.faster import Work, is_faster
from pyro_lottery.machine import autocast, channels_last, channels_last_, resolve_precision
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.priors import SitePrior
from pyro_lottery.threads import TURN


def precision_for_batch(name: str, model: BayesianNetwork, x: Any) -> str:
    """Return ``name``, with ``auto`` replaced by the faster precision for training ``model`` on batches of the shape of ``x``.

    ``x`` is a batch as the network takes it. On a CPU with bf16 instructions, forward and backward passes in bf16 and in
    float32 are timed, once per processor, number of threads, network and shape (:func:`pyro_lottery.faster.is_faster`).
    ``model`` and the global random generators stay as they are. Raises ``UserError`` if the network cannot be copied.
    """
    return resolve_precision(name, trees.first_tensor(x).device, lambda: _bf16_is_faster(model, x))


def precision_for_data(name: str, model: BayesianNetwork, data: Data, batch_size: int, ranks: Ranks = ALONE) -> str:
    """:func:`precision_for_batch` for training on ``data``; all ``ranks`` return what the first rank finds."""
    if name != "auto":
        return name
    return ranks.first(lambda: precision_for_batch(name, model, _batch(data, batch_size, ranks)))


def _batch(data: Data, batch_size: int, ranks: Ranks) -> Any:
    """Inputs of a rank's share of a batch: the first two examples again and again, since only the shape counts."""
    if isinstance(data.train, Stream):  # its loader makes the batches
        given = getattr(data.train.loader, "batch_size", None)
        batch_size = given or math.ceil(len(data.train) / data.train.steps)
    count = min(batch_size, len(data.train))
    count = math.ceil(count / ranks.world) if ranks.parallel == "data" else count
    return trees.map_tensors(lambda t: t[torch.arange(count, device=t.device) % len(t)], data.train.head()[0])


def _bf16_is_faster(model: BayesianNetwork, x: Any) -> bool:
    copied = functools.cache(lambda: _copy(model))  # called only if no measurement is kept

    def passes(precision: str) -> Work:
        return lambda: _passes(copied(), x, precision)

    what = f"bf16 or fp32 in a training step of {_description(model)} on {trees.shapes(x)}, torch {torch.__version__}"
    with TURN, seeds.rng("cpu", 0, "precision"):  # since a network may draw random numbers, for example in dropout
        return is_faster(passes("bf16"), passes("32"), what)


def _copy(model: BayesianNetwork) -> BayesianNetwork:
    try:
        copied = copy.deepcopy(model).train()
    except (TypeError, RuntimeError, AttributeError, copy.Error) as error:
        raise UserError(
            f"--precision auto measures a copy of the network, but copy.deepcopy cannot copy it ({one_line(error)}); "
            "give --precision 32 or bf16"
        ) from error
    channels_last_(copied)
    return copied


def _passes(model: BayesianNetwork, x: Any, precision: str) -> Callable[[], object]:
    """A function that makes a forward and a backward pass, in which BatchNorm's statistics change."""
    x = trees.map_tensors(channels_last, x)
    weights = {site: value.detach().clone().requires_grad_() for site, value in model.initial_values().items()}
    values = [*weights.values(), *(p for p in model.net.parameters() if p.requires_grad)]

    def once() -> object:
        with (
            pyro.validation_enabled(False),
            poutine.block(),
            poutine.condition(data=weights),
            autocast(values[0].device, precision),
        ):
            output = model.outputs(x)
        return torch.autograd.grad(output.square().mean(), values, allow_unused=True)

    return once


def _description(model: BayesianNetwork) -> str:
    """The network's type, and a checksum of its modules, their options and the shapes of its weights.

    The text of a module is not used, since it reads weights, which would be sampled.
    """
    modules = [
        (
            name,
            type(module).__name__,
            sorted((key, repr(value)) for key, value in vars(module).items() if _is_option(key, value)),
        )
        for name, module in model.net.named_modules()
        if not isinstance(module, SitePrior)
    ]
    shapes = [(site, tuple(value.shape)) for site, value in model.initial_values().items()]
    return f"{type(model.net).__name__} {hashlib.sha256(repr((modules, shapes)).encode()).hexdigest()[:16]}"


def _is_option(key: str, value: Any) -> bool:
    """Whether an attribute of a module is a plain value such as a stride, whose text is the same in every process."""
    if key.startswith("_") or key == "training":
        return False
    return all(v is None or isinstance(v, int | float | str) for v in (value if isinstance(value, tuple) else (value,)))
