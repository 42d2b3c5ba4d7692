"""``sparsify``: pruned weights are exactly zero and cost exactly nothing."""

from __future__ import annotations

import difflib
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Size, Tensor

from pyro_lottery.errors import UserError
from pyro_lottery.types import Mask


class Pruned(dist.MaskedDistribution):
    """A distribution per weight whose pruned weights are the constant 0, with log-probability and KL 0."""

    _mask: Any  # a Tensor, which Pyro types as bool

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.where(self._mask, self.base_dist.sample(sample_shape), 0.0)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return torch.where(self._mask, self.base_dist.rsample(sample_shape), 0.0)


@effectful(type="active_mask")
def active_mask(site: str, shape: Size) -> Tensor | None:
    """The mask that the enclosing ``sparsify`` has for ``site``, or None.

    A guide that draws several sites as one vector asks this, since no handler can mask within a joint distribution.
    """
    return None


class SparsifyMessenger(Messenger):
    """The effect behind :func:`sparsify`."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.mask = {name: m.bool() for name, m in mask.items()}
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
        site = msg["args"][0]
        self._sites.add(site)
        if site in self.mask:
            msg["value"], msg["done"] = self.mask[site], True

    def _pyro_sample(self, msg: Any) -> None:
        # Acts before the value is drawn and changes the distribution itself: a handler that edits the value
        # afterwards would come too late for a trace further out, and poutine.mask cannot reach inside an event.
        if msg["is_observed"]:
            return
        name, fn = msg["name"], msg["fn"]
        if name not in self.mask and msg["infer"].get("is_auxiliary"):
            name = name.removesuffix("_unconstrained")  # AutoNormal's real draw; the named site is its Delta
        self._sites.add(name)
        if name not in self.mask:
            if msg["infer"].get("is_auxiliary") and name.endswith("_latent") and not getattr(fn, "knows_masks", False):
                raise UserError(
                    f"{type(fn).__name__} draws all weights as one vector, in which pruned weights cannot be masked; "
                    "build the guide with pyro_lottery.guides.auto"
                )
            return
        if isinstance(fn, dist.Delta):
            mask = self._of(name, fn.v.shape, fn.v.device)
            msg["fn"] = dist.Delta(torch.where(mask, fn.v, 0.0), fn.log_density, fn.event_dim)
        elif isinstance(fn, dist.Independent) and not fn.base_dist.event_shape:
            base = fn.base_dist
            mask = self._of(name, base.batch_shape, _device(base) if msg["value"] is None else msg["value"].device)
            msg["fn"] = Pruned(base, mask).to_event(fn.reinterpreted_batch_ndims)
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
