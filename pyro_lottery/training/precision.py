"""``--precision auto``: the precision in which a network's training steps are faster."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_lottery import trees
from pyro_lottery.data import Data
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.errors import UserError
from pyro_lottery.faster import Work, is_faster
from pyro_lottery.machine import autocast, channels_last, resolve_precision
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.training.trial import apart, copied_for, description, like_a_batch


def precision_for_batch(name: str, model: BayesianNetwork, x: Any) -> str:
    """Return ``name``, with ``auto`` replaced by the faster precision for training ``model`` on batches of the shape of ``x``.

    ``x`` is a batch as the network takes it. On a CPU with bf16 instructions, forward and backward passes in bf16 and in
    float32 are timed, once per processor, number of threads, network and shape (:func:`pyro_lottery.faster.is_faster`).
    ``model`` and the global random generators stay as they are. Raises ``UserError`` if the network cannot be copied.
    """
    return resolve_precision(name, trees.first_tensor(x).device, lambda: _bf16_is_faster(model, x))


def precision_for_data(name: str, model: BayesianNetwork, data: Data, batch_size: int, ranks: Ranks = ALONE) -> str:
    """:func:`precision_for_batch` for training on ``data``; all ``ranks`` return what the first rank finds.

    Raises ``UserError`` for ``tf32`` on a CPU.
    """
    if name == "tf32" and data.train.device.type != "cuda":
        raise UserError("--precision tf32 needs a GPU, whose products it rounds; use 32, bf16 or auto")
    if name != "auto":
        return name
    return ranks.first(
        lambda: precision_for_batch(name, model, like_a_batch(data.train.head()[0], data, batch_size, ranks))
    )


def _bf16_is_faster(model: BayesianNetwork, x: Any) -> bool:
    copied = functools.cache(
        lambda: copied_for("--precision auto", "--precision 32 or bf16", model)
    )  # called only if no measurement is kept

    def passes(precision: str) -> Work:
        return lambda: _passes(copied(), x, precision)

    what = f"bf16 or fp32 in a training step of {description(model)} on {trees.shapes(x)}, torch {torch.__version__}"
    with apart():  # since a network may draw random numbers, for example in dropout
        return is_faster(passes("bf16"), passes("32"), what)


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
