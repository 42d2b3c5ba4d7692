"""The diagonal curvature of a network's loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from pyro_lottery.distributions import base
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.model import BayesianNetwork, one_tensor
from pyro_lottery.model.fixed import plain
from pyro_lottery.model.outputs import in_dtype
from pyro_lottery.types import Mask

NUMBERS = 2**27
"""Gradients of single examples that are in memory at a time, in numbers."""


def ggn_diagonal(
    model: BayesianNetwork, values: Mapping[str, Tensor], mask: Mask, examples: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Σ over ``examples`` of the diagonal of JᵀΛJ, the generalised Gauss-Newton matrix, at the weights ``values``.

    J is the Jacobian of an example's outputs by the weights, and Λ the Hessian of its negative log-likelihood by the outputs; for a classifier
    this is the Fisher information. ``examples`` are batches of inputs [b, ...] and targets [b, ...]; the network is in eval mode, so
    that examples do not see each other. Costs one gradient of every single example for each output. Returns a tensor per site, of the
    site's shape. Raises ``UserError`` for a network whose gradients of single examples ``torch.func`` cannot take.
    """
    if model.hyper_sites:
        raise UserError(
            f"laplace needs a prior without hyperpriors, but this one samples {model.hyper_sites[0]!r}; use mean_field"
        )
    net = plain(model.net, values, mask)
    parameters = {name: p.detach() for name, p in net.named_parameters() if name in values}
    rest = {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers()) if name not in values}
    size = max(1, NUMBERS // sum(p.numel() for p in parameters.values()))

    def along(weights: dict[str, Tensor], x: Tensor, direction: Tensor) -> Tensor:
        x = x[None].clone()  # the network may change its input in place
        outputs = one_tensor(functional_call(net, weights | rest, (x,)))
        return (outputs.flatten() * direction).sum()

    each = vmap(grad(along), in_dims=(None, 0, 0))
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with pyro.validation_enabled(False):
        for inputs, targets in examples:
            inputs = in_dtype(inputs, next(iter(parameters.values())).dtype)
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                roots = _roots(model, one_tensor(net(x.clone())).detach(), y)
                for k in range(roots.shape[-1]):
                    for name, gradient in _of_each(each, parameters, x, roots[..., k]).items():
                        found[name] += gradient.square_().sum(0)
    return found


def _of_each(each: Any, *args: Any) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = each(*args)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"laplace needs a gradient of each example, which torch.func cannot take of this network ({one_line(error)}); use another posterior, such as swag"
        ) from error
    return found


def _roots(model: BayesianNetwork, outputs: Tensor, y: Tensor) -> Tensor:
    """R [b, outputs, outputs] with Λ = RRᵀ for each example, where negative eigenvalues of Λ count as 0."""
    flat = outputs.flatten(1).clone().requires_grad_()
    likelihood = model.likelihood(flat.view(outputs.shape))
    loss = -likelihood.log_prob(model.checked_targets(y, likelihood, outputs)).sum()
    (first,) = torch.autograd.grad(loss, flat, create_graph=True)
    rows = [torch.autograd.grad(first[:, k].sum(), flat, retain_graph=True)[0] for k in range(flat.shape[1])]
    values, vectors = torch.linalg.eigh(torch.stack(rows, 1).double())
    return (vectors * values.clamp(min=0).sqrt()[:, None]).to(outputs)


def prior_precision(model: BayesianNetwork, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """−∂² log p(w)/∂w² of every weight at ``values``: 1/s² for a Normal prior of scale s. Returns a tensor per site, of the site's shape.

    Raises ``UserError`` for a prior under which weights depend on each other.
    """
    found = {}
    for name, value in values.items():
        w = value.detach().clone().requires_grad_()
        prior: Any = base(model.prior_of(name))
        if prior.event_shape:
            raise UserError(
                f"laplace needs priors of single weights, but that of {name!r} is a {type(prior).__name__} over several"
            )
        with torch.enable_grad():
            density = prior.log_prob(w).sum()
            first = torch.autograd.grad(density, w, create_graph=True)[0] if density.requires_grad else torch.zeros(())
            second = torch.autograd.grad(first.sum(), w)[0] if first.requires_grad else torch.zeros_like(w)
        found[name] = -second
    return found
