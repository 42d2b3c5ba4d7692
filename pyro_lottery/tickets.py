"""Everything that makes a starting point, as pure functions that return a Ticket."""

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
    """mask × rewind point (paper §5): survivors at the values of ``start``, pruned weights at (0, 0)."""
    return Ticket(mask, masks.apply(mask, start), net)


def reinit(ticket: Ticket, seed: int, initialise: Callable[[int], Ticket]) -> Ticket:
    """The ticket's mask with values drawn anew from the initialisation (paper §6).

    ``initialise(seed)`` is the dense network as that seed draws it.
    """
    fresh = initialise(seeds.derive(seed, "reinit"))
    return rewind(ticket.mask, fresh.start, fresh.net)


def shuffle(ticket: Ticket, seed: int, dense: Ticket, kind: str) -> Ticket:
    """A random mask of the ticket's size over the values that the dense network started from (paper §6).

    ``kind``, one of ``SHUFFLES``, says what the mask keeps: ``shuffle_global`` the total alone, ``shuffle_even`` the
    global density in every layer, ``shuffle_layerwise`` the count of every layer. ``dense`` holds the values, also of
    weights that the ticket has pruned.
    """
    mask = SHUFFLES[kind](ticket.mask, seeds.generator("cpu", seed, kind))
    return rewind(mask, dense.start, dense.net)


def transplant(weights: Sites, mask: Mask | None, into: Ticket) -> Ticket:
    """A plain network's weights as the starting loc of a Bayesian one (paper §7).

    loc ← ``weights``, mask ← ``mask``, scale ← that of ``into``, the Bayesian network's dense ticket. ``weights`` are
    named as in the network and hold its normalisation parameters and buffers too. Where ``mask`` is None, zeros among
    the prunable weights are the mask. What a plain network does not have, a learned noise scale, stays as in ``into``.
    Raises ``UserError`` that names an unmatched, missing or mis-shaped key, and a mask that prunes what cannot be pruned:
    biases, the final layer, what stays deterministic.
    """
    start = into.start
    likelihood = {name: value for name, value in into.net.items() if name.startswith(LIKELIHOOD)}
    weights = likelihood | dict(_once(weights, {*start.loc, *into.net}))
    _check(weights, {**start.loc, **into.net}, "")
    if mask is None:
        mask = {name: weights[name] != 0 for name in start.prunable}
    for name in sorted(mask.keys() & (start.loc.keys() | into.net.keys()) - {*start.prunable}):
        if not bool((mask[name] != 0).all()):
            what = "stays deterministic in this network" if name in into.net else "is a bias or the final layer"
            raise UserError(f"the mask prunes {name!r}, which {what} and would be dense again")
    mask = {name: value for name, value in mask.items() if name in start.prunable or name not in weights}
    _check(mask, {name: start.loc[name] for name in start.prunable}, "mask of ")
    for name, value in mask.items():
        if not ((value == 0) | (value == 1)).all():
            raise UserError(f"mask of {name} holds other values than 0 and 1")
    if mask and not any(bool(value.any()) for value in mask.values()):
        raise UserError("the mask keeps no weight")
    loc = {name: weights[name].to(value) for name, value in start.loc.items()}
    net = {name: weights[name].to(value) for name, value in into.net.items()}
    mask = {name: mask[name].to(start.loc[name].device).bool() for name in start.prunable}
    return rewind(mask, Posterior(loc, start.scale, start.prunable), net)


def check_mask(weights: Sites, mask: Mask) -> None:
    """Raise ``UserError`` for a mask that keeps weights which are 0, in a layer of ``weights`` that is pruned itself.

    A layer counts as pruned where some of its weights are 0 and some are not. Masks of dense weights, and masks that
    prune more than is 0, are all right.
    """
    kept = {name: int(((weights[name] == 0) & (value != 0)).sum()) for name, value in mask.items()}
    wrong = {name: count for name, count in kept.items() if count and bool((weights[name] != 0).any())}
    if wrong:
        name, count = next(iter(wrong.items()))
        raise UserError(
            f"the mask keeps {sum(wrong.values()):,} weights that are 0, {count:,} of {name!r}: these weights were pruned by "
            "another mask; without a mask, zeros are the mask"
        )


def compare(a: Ticket, b: Ticket) -> pd.DataFrame:
    """How far two masks of one architecture agree: a row per layer and one, ``all``, for the network.

    ``density_a``, ``density_b``, ``jaccard`` = |A∩B| / |A∪B|, and ``chance``, what two random masks of the same
    densities p and q share on average: pq / (p + q − pq). Raises ``UserError`` that names what differs.
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


def bake_pruned(state: Sites) -> Sites:
    """A ``state_dict`` in which what ``torch.nn.utils.prune`` keeps as ``NAME_orig`` and ``NAME_mask`` is their product."""
    names = {n.removesuffix("_orig") for n in state if n.endswith("_orig") and f"{n.removesuffix('orig')}mask" in state}
    kept = {n: t for n, t in state.items() if n.removesuffix("_orig").removesuffix("_mask") not in names}
    for name in sorted(names):
        weight, mask = state[f"{name}_orig"], state[f"{name}_mask"]
        if weight.shape != mask.shape:
            raise UserError(f"{name}_mask is {tuple(mask.shape)}, but {name}_orig is {tuple(weight.shape)}")
        kept[name] = weight * mask
    return kept


def _once(state: Sites, known: set[str]) -> Sites:
    """A ``state_dict`` without what is in it a second time, by another name: a module that is in a network in two places."""

    def memory(value: Tensor) -> tuple[int, tuple[int, ...]]:
        return value.data_ptr(), tuple(value.shape)

    there = {memory(value) for name, value in state.items() if name in known}
    return {name: value for name, value in state.items() if name in known or memory(value) not in there}


def _check(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    check_same(given, wanted, prefix=what)
    check_finite(given, wanted, what)
