"""The memory that a training step takes, estimated before the first one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import guides, trees
from pyro_lottery.elbo import ELBO
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.training.trial import apart

ADAM = 4
"""Tensors of a trained parameter: its values, their gradient, and Adam's two moments."""


def step_memory(
    model: BayesianNetwork, guide: AutoGuide, x: Any, y: Tensor, batch_size: int, estimator: str = "weights"
) -> int:
    """About how many bytes training takes with ``batch_size`` examples a batch, in float32 and beside the data.

    These are parameters, gradients, Adam's moments, the gradient of the drawn weights, and what the backward pass keeps of a
    forward pass. The latter is measured on a copy, for all of ``x`` and ``y``, at least four examples, and for half of them: it
    grows in proportion. What a GPU's libraries take for themselves is not in it. ``model`` and the global random generators
    stay as they are.

    Raises ``UserError`` if the network cannot be copied.
    """
    try:
        net, draw = copy.deepcopy((model, guide))
    except (TypeError, RuntimeError, AttributeError, copy.Error) as error:
        raise UserError(
            f"the network's memory is measured on a copy, which cannot be made ({one_line(error)})"
        ) from error
    net.train()
    parameters = {id(p): p for p in (*draw.parameters(), *net.parameters())}.values()
    fixed = sum(p.nbytes * (ADAM if p.requires_grad else 1) for p in parameters)
    fixed += sum(buffer.nbytes for buffer in net.buffers())
    point = guides.is_point(guide)
    elbo = ELBO(estimator="weights" if point else estimator)
    moments = 2 if estimator == "local" and not point else 1  # means and variances have gradients of their own
    fixed += moments * sum(value.nbytes for value in net.initial_values().values())
    count = trees.count(x)
    half, whole = (_kept(net, draw, elbo, _first(n, x), y[:n].clone()) for n in (count // 2, count))
    each = (whole - half) / (count - count // 2)
    return round(fixed + whole + each * (batch_size - count))


def too_large(needed: Callable[[int], int], batch_size: int, free: int) -> str | None:
    """One line for batches that need more memory than is ``free``, with the largest batch that fits; None if they fit.

    ``needed`` is :func:`step_memory` as a function of the batch size, which is linear.
    """
    fixed, first = needed(0), needed(1)
    each = first - fixed
    whole = fixed + each * batch_size
    if whole <= free:
        return None
    fits = (free - fixed) // each if each else 0
    remedy = f"about {fits} examples a batch fit (--batch-size)" if fits > 0 else "no batch fits"
    return (
        f"training with {batch_size} examples a batch needs about {whole / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of the GPU's "
        f"memory are free; {remedy}"
    )


def _first(count: int, x: Any) -> Any:
    """Copies of the first examples, since a view would keep all of them."""
    return trees.map_tensors(lambda t: t[:count].clone(), x)


def _kept(model: BayesianNetwork, guide: AutoGuide, elbo: ELBO, x: Any, y: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*guide.parameters(), *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with apart(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = elbo.terms(model, guide, x, y)
    del terms  # until here its graph held all that was counted, so that no place was counted twice
    return sum(kept.values())
