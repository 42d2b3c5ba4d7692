"""Tickets: pure functions that build, convert and compare the starting points of trainings (``Ticket``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_lottery import masks, seeds
from pyro_lottery.errors import UserError
from pyro_lottery.names import LIKELIHOOD, check_finite, check_same
from pyro_lottery.types import Mask, Posterior, Sites, Ticket

if TYPE_CHECKING:
    import pandas as pd

SHUFFLES: dict[str, Callable[[Mask, torch.Generator], Mask]] = {
    "shuffle_global": masks.shuffle_global,
    "shuffle_even": masks.shuffle_even,
    "shuffle_layerwise": masks.shuffle_layerwise,
}
CONTROLS = ("reinit", *SHUFFLES)
"""The randomised controls of paper §6."""


def rewind(mask: Mask, start: Posterior, net: Sites) -> Ticket:
    """The ticket mask × rewind point (paper §5): survivors start at the values of ``start``, pruned weights at (0, 0).

    ``mask`` and ``start`` hold tensors with the shapes of their sites.
    """
    return Ticket(mask, masks.apply(mask, start), net)


def reinit(ticket: Ticket, seed: int, initialise: Callable[[int], Ticket]) -> Ticket:
    """The mask of ``ticket`` with values from a new initialisation (paper §6).

    ``initialise(seed)`` returns the dense ticket that the seed initialises; its tensors have the shapes of ``ticket``'s.
    """
    fresh = initialise(seeds.derive(seed, "reinit"))
    return rewind(ticket.mask, fresh.start, fresh.net)


def shuffle(ticket: Ticket, seed: int, dense: Ticket, kind: str) -> Ticket:
    """A random mask with as many survivors as ``ticket``, over the initial values of the dense network (paper §6).

    ``kind`` is a key of ``SHUFFLES``: ``shuffle_global`` keeps only the total number of survivors, ``shuffle_even`` gives
    every layer the global density, and ``shuffle_layerwise`` keeps each layer's number. ``dense`` holds the values,
    including those of weights that ``ticket`` has pruned; its tensors have the shapes of ``ticket``'s.
    """
    mask = SHUFFLES[kind](ticket.mask, seeds.generator("cpu", seed, kind))
    return rewind(mask, dense.start, dense.net)


def transplant(weights: Sites, mask: Mask | None, into: Ticket) -> Ticket:
    """A ticket whose loc is the weights of a plain network (paper §7).

    loc is ``weights``, the mask is ``mask``, and the scale comes from ``into``, the dense ticket of the Bayesian network.
    ``weights`` is named as in the network and includes normalisation parameters and buffers. If ``mask`` is None, the
    prunable weights that are 0 are pruned. Tensors that a plain network does not have, such as a learned noise scale,
    come from ``into``. All tensors must have the shapes of ``into``'s.

    Raises ``UserError`` with the keys that are missing, unknown or of another shape, and if the mask prunes weights that
    cannot be pruned (biases, the final layer, deterministic parameters), keeps no weight, or holds other values than
    0 and 1.
    """
    start = into.start
    likelihood = {name: value for name, value in into.net.items() if name.startswith(LIKELIHOOD)}
    weights = likelihood | dict(_once(weights, {*start.loc, *into.net}))
    _check(weights, {**start.loc, **into.net}, "")
    if mask is None:
        mask = {name: weights[name] != 0 for name in start.prunable}
    for name in sorted(mask.keys() & (start.loc.keys() | into.net.keys()) - {*start.prunable}):
        if not bool((mask[name] != 0).all()):
            what = "stays deterministic in this network" if name in into.net else "is a bias or in the final layer"
            raise UserError(f"the mask prunes {name!r}, which {what}, so it cannot be pruned; leave it out of the mask")
    mask = {name: value for name, value in mask.items() if name in start.prunable or name not in weights}
    _check(mask, {name: start.loc[name] for name in start.prunable}, "mask of ")
    for name, value in mask.items():
        if not ((value == 0) | (value == 1)).all():
            raise UserError(f"mask of {name} must hold only 0 and 1")
    if mask and not any(bool(value.any()) for value in mask.values()):
        raise UserError("the mask keeps no weight; at least one must survive")
    loc = {name: weights[name].to(value) for name, value in start.loc.items()}
    net = {name: weights[name].to(value) for name, value in into.net.items()}
    mask = {name: mask[name].to(start.loc[name].device).bool() for name in start.prunable}
    return rewind(mask, Posterior(loc, start.scale, start.prunable), net)


def check_mask(weights: Sites, mask: Mask) -> None:
    """Raise ``UserError`` if ``mask`` keeps weights that are 0 in a pruned layer of ``weights``, of the same shapes.

    A layer counts as pruned if some of its weights are 0 and others are not. Masks for dense weights, and masks that
    also prune non-zero weights, are valid.
    """
    kept = {name: int(((weights[name] == 0) & (value != 0)).sum()) for name, value in mask.items()}
    wrong = {name: count for name, count in kept.items() if count and bool((weights[name] != 0).any())}
    if wrong:
        name, count = next(iter(wrong.items()))
        raise UserError(
            f"the mask keeps {sum(wrong.values()):,} weights that are 0, {count:,} of them in {name!r}, so another mask "
            "pruned these weights; without a mask, the zeros are used as the mask"
        )


def compare(a: Ticket, b: Ticket) -> pd.DataFrame:
    """A table of how well the masks of two tickets agree: one row per layer, and a row ``all`` for the network.

    Its columns are ``layer``, ``density_a``, ``density_b``, ``jaccard`` = |A∩B| / |A∪B| and ``chance`` = pq / (p + q − pq),
    the value expected for random masks with the same densities p and q. Raises ``UserError`` with the names that differ
    if the masks' sites or shapes do.
    """
    import pandas as pd

    _check(b.mask, a.mask, "mask of ")
    rows = []
    for name in [*a.mask, "all"]:
        one, other = ([t.mask[name]] if name != "all" else list(t.mask.values()) for t in (a, b))
        x, y = (torch.cat([m.cpu().reshape(-1).bool() for m in part]) for part in (one, other))
        p, q, union = float(x.double().mean()), float(y.double().mean()), int((x | y).sum())
        jaccard = int((x & y).sum()) / union if union else 1.0
        chance = p * q / (p + q - p * q) if union else 1.0
        rows.append({"layer": name, "density_a": p, "density_b": q, "jaccard": jaccard, "chance": chance})
    return pd.DataFrame(rows)


def close(a: Ticket, b: Ticket) -> bool:
    """Whether two tickets have the same masks and, but for rounding, the same values: another processor may draw an initial
    value with another last bit.
    """
    groups = ((a.start.loc, b.start.loc), (a.start.scale or {}, b.start.scale or {}), (a.net, b.net))
    if a.mask.keys() != b.mask.keys() or any(one.keys() != other.keys() for one, other in groups):
        return False
    if any(not torch.equal(mask.cpu().bool(), b.mask[name].cpu().bool()) for name, mask in a.mask.items()):
        return False
    return all(
        value.shape == other[name].shape and torch.allclose(value.cpu(), other[name].cpu(), rtol=1e-5, atol=1e-7)
        for one, other in groups
        for name, value in one.items()
    )


def bake_pruned(state: Sites) -> Sites:
    """A ``state_dict`` in which each pair ``NAME_orig`` and ``NAME_mask`` of ``torch.nn.utils.prune`` is replaced by its product.

    Raises ``UserError`` if the shapes of a pair differ.
    """
    names = _pruned_in(state)
    kept = {n: t for n, t in state.items() if n.removesuffix("_orig").removesuffix("_mask") not in names}
    for name in names:
        weight, mask = state[f"{name}_orig"], state[f"{name}_mask"]
        if weight.shape != mask.shape:
            raise UserError(
                f"{name}_mask has shape {tuple(mask.shape)}, but {name}_orig has shape {tuple(weight.shape)}"
            )
        kept[name] = weight * mask
    return kept


def pruned_masks(state: Sites) -> Mask:
    """The masks of ``torch.nn.utils.prune`` in a ``state_dict``, by the names of :func:`bake_pruned` and of their weights' shapes."""
    return {name: state[f"{name}_mask"] != 0 for name in _pruned_in(state)}


def _pruned_in(state: Sites) -> list[str]:
    names = (n.removesuffix("_orig") for n in state if n.endswith("_orig"))
    return sorted(name for name in names if f"{name}_mask" in state)


def _once(state: Sites, known: set[str]) -> Sites:
    """A ``state_dict`` without unknown names of tensors that it also holds under a known name, as shared modules have."""

    def memory(value: Tensor) -> tuple[int, tuple[int, ...]]:
        return value.data_ptr(), tuple(value.shape)

    there = {memory(value) for name, value in state.items() if name in known}
    return {name: value for name, value in state.items() if name in known or memory(value) not in there}


def _check(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    check_same(given, wanted, prefix=what)
    check_finite(given, wanted, what)
