"""Likelihoods of any kind: checks that they fit the targets and examples, and their means."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_lottery.distributions import elementary
from pyro_lottery.errors import UserError


def one_per_example(found: Any, output: Tensor, count: int) -> Any:
    """``found``, a likelihood with batch shape [count]; raises ``UserError`` unless it is one distribution per example."""
    if not isinstance(found, TorchDistributionMixin):
        raise UserError(
            f"likelihood() must return a distribution from pyro.distributions, got a {type(found).__name__} from "
            f"{type(found).__module__}"
        )
    if len(found.batch_shape) > 1:  # Pyro's plate would count each element as an example
        elements = len(found.batch_shape) - 1
        raise UserError(
            f"likelihood() has the batch shape {tuple(found.batch_shape)}, so every element would count as an example; "
            f"append .to_event({elements})"
        )
    if tuple(found.batch_shape) != (count,):  # the plate would repeat it for every example
        raise UserError(
            f"likelihood() has the batch shape {tuple(found.batch_shape)} for {count} examples with outputs of shape "
            f"{tuple(output.shape)}; it must be ({count},), one distribution per example"
        )
    return found


def checked_targets(y: Any, likelihood: Any, dtype: torch.dtype) -> Tensor:
    """Convert targets to the dtype that ``likelihood`` needs: integers to ``dtype``, labels to int64.

    Raises ``UserError`` if the shape of ``y`` is not the likelihood's, which would broadcast, or if its dtype is wrong.
    Only shapes and dtypes are read, so this does not wait for a GPU.
    """
    if not isinstance(y, Tensor) or y.is_complex():
        what = str(y.dtype) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise UserError(f"targets must be a tensor of real numbers, got {what}")
    wanted = tuple(likelihood.shape())
    if tuple(y.shape) != wanted:
        raise UserError(
            f"targets have shape {tuple(y.shape)}, but the likelihood has shape {wanted}{_remedy(y, wanted)}"
        )
    if isinstance(elementary(likelihood), dist.Categorical):  # which truncates 0.9 to 0
        if y.is_floating_point():
            raise UserError(f"labels must be integers from 0 to classes − 1, got {y.dtype}; use y.long()")
        return y.long()
    return y if y.is_floating_point() else y.to(dtype)


def _remedy(y: Tensor, wanted: tuple[int, ...]) -> str:
    """A hint how to reshape the targets, if there is an obvious way."""
    if (*y.shape, 1) == wanted:
        return f"; use y[{':, ' * y.ndim}None]"
    if tuple(y.shape) == (*wanted, 1):
        return "; use y.squeeze(-1)"
    if y.ndim and len(y) != wanted[0]:
        return f"; there are {len(y)} targets for {wanted[0]} examples"
    return ""


_CIRCULAR = (dist.VonMises, dist.VonMises3D, dist.SineBivariateVonMises, dist.SineSkewed, dist.ProjectedNormal)
"""Distributions of directions, whose ``mean`` and ``variance`` are not moments of a number."""


def moment(likelihood: Any, name: str, like: Tensor) -> Tensor:
    """``likelihood.mean`` or ``.variance``, by ``name``, [n, ...]; NaN, with dtype and device of ``like``, if not known."""
    if isinstance(elementary(likelihood), _CIRCULAR):
        return like.new_full(tuple(likelihood.shape()), math.nan)
    try:
        return getattr(likelihood, name)
    except NotImplementedError:
        return like.new_full(tuple(likelihood.shape()), math.nan)
