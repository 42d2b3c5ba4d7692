"""``sparsify``: pruned weights are exactly zero and cost exactly nothing."""

from __future__ import annotations

import difflib
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Size, Tensor

from pyro_lottery.distributions import Pruned, base
from pyro_lottery.errors import UserError
from pyro_lottery.types import Mask


@effectful(type="active_mask")
def active_mask(site: str, shape: Size, device: torch.device | None = None) -> Tensor | None:
    """The mask that the enclosing ``sparsify`` has for ``site``, or None: the same object each time.

    A guide that draws several sites as one vector asks this, since no handler can mask within a joint distribution.
    """
    return None


class SparsifyMessenger(Messenger):
    """The effect behind :func:`sparsify`."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.mask = {name: m.bool().clone() for name, m in mask.items()}  # what a caller does to his is his affair
        self._joined: dict[str, tuple[Tensor, Tensor]] = {}  # an inner handler's mask, and what it shares with ours
        self._sites: set[str] = set()  # every random site met, to tell a misspelt mask from an unused one

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        missed = [name for name in self.mask if name not in self._sites]
        if exception[0] is None and self._sites and missed:
            near = difflib.get_close_matches(missed[0], self._sites, n=1) or sorted(self._sites)[:1]
            raise UserError(
                f"the mask names site {missed[0]!r}, which the network does not have; did you mean {near[0]!r}?"
            )

    def _of(self, name: str, shape: Size, device: torch.device | None) -> Tensor:
        mask = self.mask[name]
        if mask.shape != shape:
            raise UserError(f"the mask of site {name!r} is {tuple(mask.shape)}, but the site is {tuple(shape)}")
        if device is not None and mask.device != device:
            mask = self.mask[name] = mask.to(device)
        return mask

    def _pyro_active_mask(self, msg: Any) -> None:
        site, shape, device = (*msg["args"], None)[:3]
        self._sites.add(site)
        if site in self.mask:
            mask, inner = self._of(site, shape, device), msg["value"]
            if inner is not None:
                if site not in self._joined or self._joined[site][0] is not inner:
                    self._joined[site] = (inner, mask & inner.to(mask.device))
                mask = self._joined[site][1]
            msg["value"], msg["done"] = mask, True

    def _pyro_sample(self, msg: Any) -> None:
        # Acts before the value is drawn and changes the distribution itself: a handler that edits the value
        # afterwards would come too late for a trace further out, and poutine.mask cannot reach inside an event.
        if msg["is_observed"]:
            return
        name, fn = msg["name"], msg["fn"]
        if getattr(base(fn), "knows_masks", False):
            return
        if name not in self.mask and msg["infer"].get("is_auxiliary"):
            name = name.removesuffix("_unconstrained")  # AutoNormal's real draw; the named site is its Delta
            if name == msg["name"]:
                raise UserError(
                    f"the guide draws its weights from {name!r}, in which pruned ones cannot be masked; use mean_field, or "
                    "guides.auto with AutoNormal, AutoDiagonalNormal or AutoMultivariateNormal, full or low-rank"
                )
        self._sites.add(name)
        if name not in self.mask:
            return
        if isinstance(fn, dist.Delta):
            mask = self._of(name, fn.v.shape, fn.v.device)
            msg["fn"] = dist.Delta(torch.where(mask, fn.v, 0.0), fn.log_density, fn.event_dim)
        elif isinstance(fn, dist.Independent) and not fn.base_dist.event_shape:
            each = fn.base_dist
            mask = self._of(name, each.batch_shape, _device(each) if msg["value"] is None else msg["value"].device)
            msg["fn"] = Pruned(each, mask).to_event(fn.reinterpreted_batch_ndims)
        else:
            raise UserError(
                f"site {name!r}: a {type(fn).__name__} has no distribution per weight to prune; use .to_event()"
            )


def _device(distribution: dist.TorchDistribution) -> torch.device | None:
    for value in vars(distribution).values():
        if isinstance(value, Tensor):
            return value.device
    inner = getattr(distribution, "base_dist", None)
    return None if inner is None else _device(inner)


def sparsify(mask: Mask) -> SparsifyMessenger:
    """Within this context (or for a callable it decorates) every pruned weight is exactly zero in every sample of the
    guide and of the prior, and adds exactly 0 to the KL divergence (paper §3: a pruned weight has (μ, σ) = (0, 0)).

    ``mask``: one bool tensor per site, shaped like the site; sites without one are left alone. A name that no
    sampled site answers to, or a wrong shape, raises ``UserError``.
    """
    return SparsifyMessenger(mask)
