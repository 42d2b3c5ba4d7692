"""Which weights lie on a path from the inputs to the outputs."""

from __future__ import annotations

import torch

from pyro_lottery import seeds, trees
from pyro_lottery.scores import Context
from pyro_lottery.types import Mask


def on_paths(context: Context) -> Mask:
    """The survivors of ``context.mask`` through which the inputs reach the outputs; a bool tensor per site, of the site's shape.

    The others have no effect: all weights before them or behind them are pruned (the effective sparsity of Vysogorets and Kempe 2023). A
    weight counts if the outputs have a gradient by it, in float64, for random positive weights without biases and a random positive
    input, so that nothing cancels. The network's other tensors are those at the start of level 0.
    """
    generator = seeds.generator("cpu", context.seed, "paths")

    def positive(like: torch.Tensor) -> torch.Tensor:
        return 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64)

    values = {}
    for name, loc in context.dense.start.loc.items():
        weight = positive(loc) if loc.ndim > 1 else torch.zeros(loc.shape, dtype=torch.float64)
        # Divided by the fan-in, since a product over many layers overflows otherwise.
        weight = weight / max(1, loc[0].numel()) if loc.ndim > 1 else weight
        values[name] = (weight * context.mask[name] if name in context.mask else weight).requires_grad_()
    x, _ = next(context.batches())
    x = trees.map_tensors(lambda t: positive(t[:1]), x)
    outputs = context.outputs(values, x)
    weights = (torch.rand(outputs.shape, generator=generator, dtype=torch.float64) + 0.5) * outputs
    found = torch.autograd.grad(weights.sum(), [values[name] for name in context.mask], allow_unused=True)
    return {
        name: torch.zeros_like(mask) if gradient is None else mask & (gradient != 0)
        for (name, mask), gradient in zip(context.mask.items(), found, strict=True)
    }
