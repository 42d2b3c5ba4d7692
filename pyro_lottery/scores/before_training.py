"""Scores of the initial weights, which need no training."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lottery import trees
from pyro_lottery.scores.context import Context
from pyro_lottery.types import Posterior, Sites


def initial_magnitude(posterior: Posterior, context: Context) -> Sites:
    """|w₀| of the initial weights; each tensor has the shape of its site."""
    return {site: value.detach().abs() for site, value in context.initial().items()}


def snip(posterior: Posterior, context: Context) -> Sites:
    """|w₀ ∂L/∂w₀|, what the loss of a batch would change by (Lee et al. 2019); each tensor has the shape of its site."""
    values = context.initial()
    gradients = _gradients(context.loss(values, next(context.batches())), values)
    return {site: (value.detach() * gradients[site]).abs() for site, value in values.items()}


def grasp(posterior: Posterior, context: Context) -> Sites:
    """w₀ (H g), half of what pruning a weight takes from the squared norm of a batch's gradient g, to first order (Wang et al. 2020).

    H is the Hessian of the loss L of the batch at the initial weights w₀. Each tensor has the shape of its site.
    """
    values = context.initial()
    first = _gradients(context.loss(values, next(context.batches())), values, create_graph=True)
    product = torch.stack([(g * g.detach()).sum() for g in first.values()]).sum()
    second = _gradients(product, values)
    return {site: value.detach() * second[site] for site, value in values.items()}


def synflow(posterior: Posterior, context: Context) -> Sites:
    """|w₀| ∂R/∂|w₀|, R = the sum of outputs for an input of ones with |w₀| as weights (Tanaka et al. 2020); it sees no data.

    In float64, in which R of a deep network is finite. Each tensor has the shape of its site.
    """
    values = {site: value.detach().abs().double().requires_grad_() for site, value in context.initial().items()}
    x, _ = next(context.batches())
    ones = trees.map_tensors(lambda t: torch.ones_like(t[:1], dtype=torch.float64), x)
    gradients = _gradients(context.outputs(values, ones).sum(), values)
    return {site: value.detach() * gradients[site] for site, value in values.items()}


def _gradients(of: Tensor, values: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(of, list(values.values()), create_graph=create_graph, allow_unused=True)
    return {site: torch.zeros_like(values[site]) if g is None else g for site, g in zip(values, found, strict=True)}
