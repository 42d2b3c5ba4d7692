"""Dynamic sparse training: as sparse as at its end from its first step on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Size, Tensor

from pyro_lottery import masks, scores, seeds
from pyro_lottery.schedules.moving import Move
from pyro_lottery.types import Mask, Posterior

FRACTION = 0.3
"""The fraction of a layer's weights that the first move exchanges (Evci et al. 2020, Rigging the Lottery)."""


@dataclass(frozen=True)
class Dynamic:
    """In each layer, the weights with the lowest ``score`` are exchanged for those pruned weights whose gradient is largest.

    The fraction is α(1 + cos πt)/2 for progress t from 0 to 1 with α = ``FRACTION`` (Evci et al. 2020). With ``score``
    :func:`pyro_lottery.scores.snr` it removes as Sparse Subspace Variational Inference does (Li et al. 2024): by the ratio of mean and standard
    deviation of |w|, which rises with |μ|/σ and with nothing else. Every layer keeps its number of weights.
    """

    score: scores.Score

    @staticmethod
    def fraction(progress: float) -> float:
        """The fraction of a layer's weights that is exchanged.

        >>> Dynamic.fraction(0.0), Dynamic.fraction(1.0)
        (0.3, 0.0)
        """
        return FRACTION * (1 + math.cos(math.pi * progress)) / 2

    def move(self, at: Move) -> Mask:
        """A mask with as many weights of every layer. The gradient is that of the loss of one batch for one draw of the weights."""
        values = scores.ranks(self.score, at.posterior, at.context)
        masks.check_score(at.mask, values)
        gradients = _gradients(at)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            return at.mask  # the training has diverged, which the next check of its loss reports
        return {
            name: _exchanged(mask, values[name], gradients[name], self.fraction(at.progress))
            for name, mask in at.mask.items()
        }


def _exchanged(mask: Tensor, score: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    kept, pruned = mask.reshape(-1).nonzero().squeeze(1), (~mask).reshape(-1).nonzero().squeeze(1)
    count = min(int(fraction * len(kept)), len(pruned))
    moved = mask.reshape(-1).clone()
    moved[kept[masks.lowest(score.reshape(-1)[kept], count)]] = False
    moved[pruned[masks.lowest(-gradient.reshape(-1)[pruned].abs(), count)]] = True
    return moved.view(mask.shape)


def _gradients(at: Move) -> dict[str, Tensor]:
    """The gradient of every weight, pruned or not, with the sites' shapes."""
    values = {name: value.requires_grad_() for name, value in _draw(at.posterior).items()}
    loss = at.loss(values, next(at.context.batches()))
    sites = list(at.mask)
    found = torch.autograd.grad(loss, [values[name] for name in sites], allow_unused=True)
    return {
        name: torch.zeros_like(values[name]) if each is None else each for name, each in zip(sites, found, strict=True)
    }


def _draw(posterior: Posterior) -> dict[str, Tensor]:
    if posterior.scale is None:
        return {name: loc.clone() for name, loc in posterior.loc.items()}
    return {name: loc + posterior.scale[name] * torch.randn_like(loc) for name, loc in posterior.loc.items()}


def erdos_renyi(shapes: Mapping[str, Size], density: float, seed: int) -> Mask:
    """A random mask of ⌈density × all⌉ weights, denser in smaller layers (Evci et al. 2020: Erdős–Rényi-Kernel).

    The density of a layer with a weight of shape (a, b, ...) is proportional to (a + b + ...)/(a·b·...), and at most 1. Returns a
    bool tensor of each of ``shapes``.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    left = max(1, math.ceil(Fraction(str(density)) * sum(sizes.values())))  # the decimal number that it prints as
    shares = {name: float(sum(shape)) for name, shape in shapes.items()}
    counts = dict.fromkeys(shapes, 0)
    while full := [n for n in shares if left * shares[n] >= sizes[n] * sum(shares.values())]:
        for name in full:  # dense; the others share what is left
            counts[name] = sizes[name]
            left -= sizes[name]
            del shares[name]
    whole = sum(shares.values())
    exact = {name: left * share / whole for name, share in shares.items()}
    counts |= {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: left - sum(counts[name] for name in exact)]:
        counts[name] += 1
    first = {name: (torch.arange(sizes[name]) < counts[name]).view(shape) for name, shape in shapes.items()}
    return masks.shuffle_layerwise(first, seeds.generator("cpu", seed, "erdos_renyi"))
