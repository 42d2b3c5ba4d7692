"""Scores of the initial weights, which need no training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_lottery import trees
from pyro_lottery.errors import UserError, one_line
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

    H is the Hessian of the loss L of the batch at the initial weights w₀. Each tensor has the shape of its site. Raises ``UserError`` for a network
    without second derivatives.
    """
    values = context.initial()
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the faster forms of attention have no second derivative
            first = _gradients(context.loss(values, next(context.batches())), values, create_graph=True)
            product = torch.stack([(g * g.detach()).sum() for g in first.values()]).sum()
            second = _gradients(product, values)
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise UserError(
            f"--score grasp needs second derivatives, which the network does not have ({one_line(error)}); use --score snip"
        ) from error
    return {site: value.detach() * second[site] for site, value in values.items()}


ROUNDS, LEAST = 100, 1e-3
"""In how many rounds :func:`synflow` prunes, and down to which density; what is left then is ranked by its flow."""


def synflow(posterior: Posterior, context: Context) -> Sites:
    """The order in which iterative synaptic flow prunes the weights (Tanaka et al. 2020, Algorithm 1), from 0 for the first; it sees no data.

    In each of ``ROUNDS`` rounds, whose densities fall exponentially, the weights with the least :func:`flow` go. All in one round would
    cut whole layers off. Each tensor has the shape of its site. Raises ``UserError`` where no weight has a flow.
    """
    sites = list(posterior.prunable)
    values = {site: value.detach().abs().double() for site, value in context.initial().items()}
    x, _ = next(context.batches())
    shapes, sizes = [values[site].shape for site in sites], [values[site].numel() for site in sites]
    left = torch.cat(
        [
            context.mask[site].flatten() if site in context.mask else torch.ones(n, dtype=torch.bool)
            for site, n in zip(sites, sizes, strict=True)
        ]
    )
    total, order = int(left.sum()), torch.zeros(left.numel(), dtype=torch.double)
    done = 0
    for number in range(1, ROUNDS + 1):
        flows = flow(context, values, x)
        if number == 1 and not any(bool(flows[site].any()) for site in sites):
            raise UserError(
                "--score synflow: no prunable weight has a flow, because the network's outputs do not grow with its inputs, as behind a layer that starts at 0; use another score"
            )
        where = left.nonzero()[:, 0]
        ranked = where[torch.cat([flows[site].flatten() for site in sites])[where].argsort(stable=True)]
        keep = 0 if number == ROUNDS else max(1, round(total * LEAST ** (number / (ROUNDS - 1))))
        gone = ranked[: max(0, len(ranked) - keep)]
        order[gone] = torch.arange(done, done + len(gone), dtype=torch.double)
        done, left[gone] = done + len(gone), False
        for site, kept in zip(sites, left.split(sizes), strict=True):
            values[site] *= kept.view_as(values[site])
    found = {site: part.view(shape) for site, part, shape in zip(sites, order.split(sizes), shapes, strict=True)}
    return {site: found.get(site, torch.zeros_like(value)) for site, value in values.items()}


def flow(context: Context, values: Mapping[str, Tensor], x: Any) -> Sites:
    """The synaptic flow |w ∂R/∂w|, R = the sum of outputs for an input of ones like ``x`` with ``values``, which are not negative, as weights.

    All other parameters are replaced by their absolute values, and whole numbers among the inputs stay. In float64, in which R of a deep network is finite.
    Each tensor has the shape of its site. Raises ``UserError`` if a flow is not finite.
    """
    weights = {site: value.detach().double().requires_grad_() for site, value in values.items()}
    ones = trees.map_tensors(
        lambda t: torch.ones_like(t[:1], dtype=torch.float64) if t.is_floating_point() else t[:1], x
    )
    positive = context.with_net(lambda name, value: value.abs() if name in context.parameters else value)
    gradients = _gradients(positive.outputs(weights, ones).sum(), weights)
    flows = {site: (value.detach() * gradients[site]).abs() for site, value in weights.items()}
    for site, found in flows.items():
        if not bool(found.isfinite().all()):
            raise UserError(
                f"--score synflow: the flow of {site!r} is not finite for an input of ones; use another score"
            )
    return flows


def _gradients(of: Tensor, values: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(of, list(values.values()), create_graph=create_graph, allow_unused=True)
    return {site: torch.zeros_like(values[site]) if g is None else g for site, g in zip(values, found, strict=True)}
