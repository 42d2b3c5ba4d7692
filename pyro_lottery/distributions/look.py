"""Functions that look inside a distribution."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_lottery.distributions.pruned import Pruned


def base(fn: Any) -> Any:
    """Return the distribution per weight, inside any ``.to_event()``."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def elementary(fn: Any) -> Any:
    """Return the distribution of one element, inside any ``.to_event()`` and ``.mask()``."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def one_number(fn: Any, kept: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """Return loc and scale, two scalars, of a Normal that is the same for every weight; None for other distributions.

    A :class:`Pruned` Normal qualifies if its mask is the same object as ``kept``.
    """
    fn = base(fn)
    if isinstance(fn, Pruned):
        if fn._mask is not kept:
            return None
        fn = fn.base_dist
    if type(fn) is not dist.Normal:
        return None
    for t in (fn.loc, fn.scale):
        if t.requires_grad or any(stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1):
            return None
    first = (0,) * fn.loc.ndim
    return fn.loc.detach()[first], fn.scale.detach()[first]
