"""Masks: pruning by score, shuffling, and counting. A mask maps each prunable site to a bool tensor, True for survivors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lottery.errors import UserError, check_counts
from pyro_lottery.names import check_same
from pyro_lottery.types import Mask, Posterior, Sites

NOTHING_PRUNABLE = (
    "nothing can be pruned: the network needs random weights in Linear, Conv or MultiheadAttention layers before the final "
    "classification layer"
)


def checked(mask: Any) -> dict[str, Tensor]:
    """``mask`` as bool tensors of the same shapes, perhaps the given ones; ``UserError`` unless it maps names to tensors or arrays of 0 and 1."""
    if not isinstance(mask, Mapping):
        raise UserError(f"a mask is a dict with a bool tensor per site, got a {type(mask).__name__}")
    found = {}
    for name, value in mask.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise UserError(f"the mask of site {name!r} must be a bool tensor, got a {type(value).__name__}")
        m = torch.as_tensor(value)
        if m.dtype != torch.bool and not bool(((m == 0) | (m == 1)).all()):
            raise UserError(
                f"the mask of site {name!r} must hold True and False, or 1 and 0, got {m.dtype} of other values"
            )
        found[name] = m.bool()
    return found


def full(posterior: Posterior) -> Mask:
    """The dense mask, in which every prunable weight survives; each tensor has the shape of its site."""
    return {name: torch.ones_like(posterior.loc[name], dtype=torch.bool) for name in posterior.prunable}


def shrink(mask: Mask, score: Sites, fraction: float) -> Mask:
    """Prune the ⌈fraction × surviving⌉ survivors with the lowest score, globally over all sites of ``mask`` (paper §5).

    ``mask`` and ``score`` hold a tensor per site, with the site's shape. Ties are broken by the network's order: the first
    weight is pruned first. ``fraction`` is read as the decimal number it prints as, so that 0.1 of 30 is 3. Warns if a
    layer loses its last weight. Raises ``UserError`` if ``fraction`` is outside (0, 1), if a score is NaN or does not fit
    the mask, or if no weight would survive.
    """
    if not isinstance(fraction, Real) or not 0 < fraction < 1:
        raise UserError(f"fraction must be between 0 and 1, both excluded, got {fraction!r}")
    mask = checked(mask)
    flat, survivors, values = _ranked(mask, score)
    count = _to_prune(len(survivors), fraction)
    if count == len(survivors):
        raise UserError(
            f"no weight would survive: {len(survivors)} are left, and --prune-fraction {fraction:g} prunes {count}; use "
            "fewer --levels or a smaller --prune-fraction"
        )
    flat[survivors[lowest(values, count)]] = False
    return _smaller(flat, mask)


def shrink_to(mask: Mask, score: Sites, count: int) -> Mask:
    """Prune the survivors with the lowest score, globally over all sites of ``mask``, until ``count`` are left.

    The mask stays as it is if it has no more. Ties are broken and layers warned of as in :func:`shrink`. Raises ``UserError`` if ``count`` is
    below 1, or as :func:`shrink` does for scores.
    """
    mask = checked(mask)
    flat, survivors, values = _ranked(mask, score)
    if count == 0:
        raise UserError(f"no weight would survive: 0 of {len(survivors)} are to be left")
    check_counts(1, **{"the number of weights that are left": count})
    if count >= len(survivors):
        return dict(mask)
    flat[survivors[lowest(values, len(survivors) - count)]] = False
    return _smaller(flat, mask)


def lowest(values: Tensor, count: int) -> Tensor:
    """The places [count] of the ``count`` lowest of ``values`` [n], not in order; of equal values the first are taken."""
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=values.device)
    last = values.kthvalue(count).values  # faster than sorting
    below, equal = (values < last).nonzero().squeeze(1), (values == last).nonzero().squeeze(1)
    return torch.cat([below, equal[: count - len(below)]])


def shrink_below(mask: Mask, score: Sites, threshold: float) -> Mask:
    """Prune all survivors whose score is below ``threshold``; the mask stays as it is if there are none.

    Warns if a layer loses its last weight. Raises ``UserError`` as :func:`shrink` does.
    """
    mask = checked(mask)
    flat, survivors, values = _ranked(mask, score)
    flat[survivors[values < threshold]] = False
    if not bool(flat.any()):
        raise UserError(f"no weight would survive: the scores of all {len(survivors)} are below {threshold:g}")
    return _smaller(flat, mask)


def check_score(mask: Mask, score: Sites) -> None:
    """Raise ``UserError`` unless ``score`` ranks every survivor of ``mask``: a number for each, in tensors of the sites' shapes."""
    _ranked(checked(mask), score)


def _ranked(mask: Mask, score: Sites) -> tuple[Tensor, Tensor, Tensor]:
    """The mask of all weights, the places of its survivors, and their scores."""
    if not total(mask):
        raise UserError(NOTHING_PRUNABLE)
    if not (isinstance(score, Mapping) and all(isinstance(value, Tensor) for value in score.values())):
        raise UserError(
            f"a score must be a dict with one tensor per site, got {type(score).__name__} {str(score)[:40]!r}"
        )
    check_same({name: score[name] for name in mask if name in score}, mask, "the score does not fit: ", "mask")
    flat = _flat(mask)
    survivors = flat.nonzero().squeeze(1)
    if odd := [name for name in mask if score[name].is_complex() or score[name].layout != torch.strided]:
        raise UserError(
            f"the score of {odd[0]!r} must be a dense tensor of real numbers, got {score[odd[0]].dtype}, {score[odd[0]].layout}"
        )
    values = _flat({name: score[name] for name in mask})[survivors]
    values = values.float() if values.dtype == torch.bool else values
    if values.isnan().any():
        raise UserError("the score of a surviving weight is NaN; scores must be numbers that rank every weight")
    return flat, survivors, values


def _smaller(flat: Tensor, mask: Mask) -> Mask:
    """``flat`` by site, with a warning if a layer of ``mask`` has lost its last weight."""
    smaller = _unflat(flat, mask)
    warn_of_empty(smaller, mask)
    return smaller


def warn_of_empty(mask: Mask, before: Mask) -> None:
    """Warn of layers that have no weight in ``mask`` and had some in ``before``."""
    emptied = [name for name, m in before.items() if bool(m.any()) and not bool(mask[name].any())]
    if emptied:
        more = f" and of {len(emptied) - 3} more layers" if len(emptied) > 3 else ""
        warnings.warn(
            f"at density {density(mask):.2%} no weight is left of {', '.join(map(repr, emptied[:3]))}{more}; the layer's "
            "output no longer depends on its input",
            stacklevel=4,
        )


def times(count: int, fraction: float) -> int:
    """How often ⌈fraction × surviving⌉ of ``count`` weights can be pruned while at least one survives.

    >>> times(10, 0.5)  # 10, 5, 2, 1
    3
    """
    done = 0
    while (taken := _to_prune(count, fraction)) < count:
        done, count = done + 1, count - taken
    return done


def _to_prune(survivors: int, fraction: float) -> int:
    return math.ceil(Fraction(str(fraction)) * survivors)


def shuffle_global(mask: Mask, generator: torch.Generator) -> Mask:
    """Permute the mask over all prunable weights together (paper §6); keeps shapes and the total number of survivors."""
    if not mask:
        return {}
    flat = _flat(mask)
    return _unflat(flat[torch.randperm(len(flat), generator=generator).to(flat.device)], mask)


def shuffle_layerwise(mask: Mask, generator: torch.Generator) -> Mask:
    """Permute the mask within each layer (paper §6); keeps shapes and each layer's number of survivors."""
    return {name: shuffle_global({name: m}, generator)[name] for name, m in mask.items()}


def shuffle_even(mask: Mask, generator: torch.Generator) -> Mask:
    """A random mask with the global density d in every layer (paper §6); keeps shapes and the total number of survivors.

    ⌊d·n⌋ or ⌈d·n⌉ of a layer's n weights survive; the layers with the largest remainders are rounded up.
    """
    kept, whole = remaining(mask), total(mask)
    counts = {name: kept * m.numel() // whole for name, m in mask.items()}
    largest_remainder = sorted(mask, key=lambda name: -(kept * mask[name].numel() % whole))
    for name in largest_remainder[: kept - sum(counts.values())]:
        counts[name] += 1
    even = {n: (torch.arange(m.numel(), device=m.device) < counts[n]).view(m.shape) for n, m in mask.items()}
    return shuffle_layerwise(even, generator)


def zeroed(value: Tensor, mask: Tensor | None) -> Tensor:
    """A copy of ``value`` with exactly 0 where ``mask``, a bool tensor of the same shape, is False; ``value`` if it is None.

    Additional leading dimensions of ``value`` are samples.
    """
    # masked_fill and where may change the memory layout, on which the bits of convolutions depend; clone keeps it.
    return value if mask is None else value.clone().masked_fill_(~mask.to(value.device), 0.0)


def apply(mask: Mask, posterior: Posterior) -> Posterior:
    """``posterior`` with (loc, scale) = (0, 0) at every pruned weight (paper §3); shapes stay the same.

    Raises ``UserError`` if ``mask`` names a site that the posterior does not have, or has another shape.
    """
    mask = checked(mask)
    check_same(
        mask,
        {name: posterior.loc[name] for name in mask if name in posterior.loc},
        "the mask does not fit: ",
        "posterior",
    )

    def masked(sites: Sites) -> Sites:
        return {name: zeroed(value, mask.get(name)) for name, value in sites.items()}

    return replace(
        posterior, loc=masked(posterior.loc), scale=None if posterior.scale is None else masked(posterior.scale)
    )


def nonzero(weights: Sites) -> Mask:
    """The mask of the weights that are not 0, a tensor per site, of the site's shape."""
    return {name: value != 0 for name, value in weights.items()}


def remaining(mask: Mask) -> int:
    """The number of surviving weights. Raises ``UserError`` if ``mask`` is none."""
    return sum(int(m.sum()) for m in checked(mask).values())


def total(mask: Mask) -> int:
    """The number of prunable weights."""
    return sum(m.numel() for m in mask.values())


def is_full(mask: Mask) -> bool:
    """Whether ``mask`` prunes nothing."""
    return remaining(mask) == total(mask)


def density(mask: Mask) -> float:
    """The fraction of prunable weights remaining, or 1 if no weight is prunable."""
    return remaining(mask) / total(mask) if total(mask) else 1.0


def density_per_site(mask: Mask) -> dict[str, float]:
    """The density of each site, in the network's order."""
    return {name: float(m.double().mean()) for name, m in mask.items()}


def _flat(sites: Sites) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in sites.values()])


def _unflat(flat: Tensor, mask: Mask) -> Mask:
    parts = flat.split([m.numel() for m in mask.values()])
    return {name: part.view(m.shape).clone() for (name, m), part in zip(mask.items(), parts, strict=True)}
