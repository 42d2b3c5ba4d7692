"""Which weights lie on a path from the inputs to the outputs."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pyro_lottery import seeds, trees
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.scores import Context
from pyro_lottery.types import Mask

QUIET = 16
"""Draws in a row without a new weight on a path, after which no more are made."""
SMALL = (1e-6, 1e-12, 1e-20)
"""Sizes of inputs, draw by draw: for small ones gates are linear also where sums have grown over many layers, and large ones do not vanish in a part in
single precision."""


def on_paths(context: Context) -> Mask:
    """The survivors of ``context.mask`` through which the inputs reach the outputs; a bool tensor per site, of the site's shape.

    All weights before the others, or behind them, are pruned, so that they do not pass anything on (the effective sparsity of Vysogorets and Kempe 2023). A
    weight counts if the outputs have a gradient by it, in float64, for random positive weights and gains without biases and a small random
    input, so that nothing cancels, saturates or is switched off. What a norm centres is switched off now and then: a weight counts if it does in one of
    many draws, which end when ``QUIET`` of them have found nothing new. Raises ``UserError`` if the network cannot run in float64.
    """
    generator = seeds.generator("cpu", context.seed, "paths")
    used = {name: torch.zeros_like(mask) for name, mask in context.mask.items()}
    quiet, sizes = 0, itertools.cycle(SMALL)
    while used and quiet < QUIET and any(not torch.equal(found, context.mask[name]) for name, found in used.items()):
        quiet += 1
        for name, gradient in _gradients(context, generator, next(sizes)).items():
            new = context.mask[name] & (gradient != 0) & ~used[name]
            if bool(new.any()):
                used[name] |= new
                quiet = 0
    return used


def _gradients(context: Context, generator: torch.Generator, size: float) -> dict[str, Tensor]:
    """The gradients of a sum of outputs by the weights of every site with survivors that has one, for one draw."""

    def positive(like: Tensor) -> Tensor:
        return 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64)

    def weight(like: Tensor) -> Tensor:
        # Divided by the fan-in, since a product over many layers overflows otherwise.
        return positive(like) / max(1, like[0].numel()) if like.ndim > 1 else positive(like)

    def own(name: str, value: Tensor) -> Tensor:
        """A random positive gain or deterministic weight; 0 for biases and BatchNorm's means."""
        last = name.rpartition(".")[2]
        if last == "running_var":
            return torch.ones_like(value)
        if last == "running_mean" or (name in context.parameters and "bias" in last):
            return torch.zeros_like(value)
        return weight(value).to(value) if name in context.parameters and value.is_floating_point() else value

    values = {}
    for name, loc in context.dense.start.loc.items():
        value = weight(loc) if loc.ndim > 1 else torch.zeros(loc.shape, dtype=torch.float64)
        values[name] = (value * context.mask[name] if name in context.mask else value).requires_grad_()
    drawn = context.with_net(own)
    x, _ = next(context.batches())
    tensors: list[Tensor] = []
    trees.map_tensors(tensors.append, x)
    # Tokens and other whole numbers stay: of all examples, since one has few of them.
    few = slice(1) if all(t.is_floating_point() for t in tensors) else slice(None)
    x = trees.map_tensors(lambda t: size * positive(t[few]) if t.is_floating_point() else t[few], x)
    try:
        outputs = drawn.outputs(values, x)
        outputs = (positive(outputs) * outputs).sum()
        found = torch.autograd.grad(outputs, [values[name] for name in context.mask], allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"the network cannot run in float64 ({one_line(error)}), which its paths need") from error
    return {name: gradient for name, gradient in zip(context.mask, found, strict=True) if gradient is not None}
