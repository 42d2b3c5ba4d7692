"""``sparsify``: makes pruned weights exactly zero, with exactly zero KL divergence."""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK, effectful
from torch import Size, Tensor

from pyro_lottery.distributions import Pruned, base
from pyro_lottery.errors import UserError
from pyro_lottery.kernels.kept import kept_of, with_kept
from pyro_lottery.masks import checked
from pyro_lottery.threads import OwnHandler
from pyro_lottery.types import Mask


@effectful(type="active_mask")
def active_mask(site: str, shape: Size, device: torch.device | None = None) -> Tensor | None:
    """The mask, of shape ``shape``, that the enclosing ``sparsify`` has for ``site``, or None; the same object at each call.

    A guide that draws several sites as one vector calls this, since no handler can mask a part of a joint distribution.
    """
    return None


@effectful(type="masks_met")
def _masks_met() -> frozenset[int]:
    """The ids of the mask dicts of all ``sparsify`` handlers that would act on a site here."""
    return frozenset()


_AS_DRAWN = "as_drawn"
"""Key of ``infer``, set by :func:`as_drawn`."""


class _OfThread(threading.local):
    """The handlers that each thread has entered."""

    def __init__(self) -> None:
        self.entered: list[SparsifyMessenger] = []


_mine = _OfThread()


@contextmanager
def not_hidden() -> Iterator[None]:
    """Let the enclosing ``sparsify`` handlers act within this context even if ``poutine.block`` hides them.

    Pyro's ``MCMC.run`` and ``Importance.run`` hide all enclosing handlers, so a masked network would be sampled dense.
    """
    met = _masks_met() if _mine.entered else frozenset()
    with ExitStack() as stack:
        for handler in _mine.entered:
            if id(handler.mask) not in met:
                stack.enter_context(handler._again())
        yield


@contextmanager
def left_out() -> Iterator[None]:
    """Leave all masks out of models traced within this context, inside ``poutine.block``: ``not_hidden`` has no effect here."""
    hidden, _mine.entered = _mine.entered, []
    try:
        yield
    finally:
        _mine.entered = hidden


class SparsifyMessenger(OwnHandler):
    """The handler that ``sparsify`` returns."""

    def __init__(self, mask: Mask):
        super().__init__()
        # Copied, so later changes to the caller's mask have no effect.
        self.mask = {name: m.clone() for name, m in checked(mask).items()}
        # For each site, an inner handler's mask, and its conjunction with this one.
        self._joined: dict[str, tuple[Tensor, Tensor]] = {}
        self._sites: set[str] = set()  # all random sites seen, to detect names in the mask that match none
        self._draws: dict[str, str] = {}  # the auxiliary draw of the running guide for each site

    def __enter__(self) -> Self:
        super().__enter__()
        _mine.entered.append(self)
        return self

    def _again(self) -> _Again:
        """A copy that shares this handler's masks and can be entered while this one is."""
        again: Any = copy.copy(self)
        again.__class__ = _Again
        return again  # type: ignore[no-any-return]

    def _pyro_masks_met(self, msg: Any) -> None:
        msg["value"], msg["done"] = (msg["value"] or frozenset()) | {id(self.mask)}, True

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _mine.entered.remove(self)
        missed = [name for name in self.mask if name not in self._sites]
        if exception[0] is None and missed and not self._sites:
            raise UserError(
                "no random site was sampled under this mask; Pyro's MCMC ignores enclosing handlers, so mask the model "
                "itself: NUTS(sparsify(mask)(model))"
            )
        if exception[0] is None and missed:
            near = difflib.get_close_matches(missed[0], self._sites, n=1) or sorted(self._sites)[:1]
            raise UserError(
                f"the mask names site {missed[0]!r}, which the network does not have; did you mean {near[0]!r}?"
            )

    def _concerns(self, msg: Any) -> bool:
        asked = msg["args"][0] if msg["type"] == "active_mask" else msg["name"]
        return msg["type"] in ("active_mask", "sample") and asked in self.mask

    def _of(self, name: str, shape: Size, device: torch.device | None, inner: Tensor | None = None) -> Tensor:
        """The mask of a site, combined with the mask of an ``inner`` handler; the same object at each call."""
        mask = self.mask[name]
        if mask.shape != shape:
            raise UserError(
                f"the mask of site {name!r} has shape {tuple(mask.shape)}, but the site has shape {tuple(shape)}"
            )
        if device is not None and mask.device != device:
            mask = self.mask[name] = mask.to(device)
        if inner is None:
            return mask
        if name not in self._joined or self._joined[name][0] is not inner:
            self._joined[name] = (inner, mask & inner.to(mask.device))
        return self._joined[name][1]

    def _pyro_active_mask(self, msg: Any) -> None:
        site, shape, device = (*msg["args"], None)[:3]
        self._sites.add(site)
        if site in self.mask:
            msg["value"], msg["done"] = self._of(site, shape, device, msg["value"]), True

    def _pyro_sample(self, msg: Any) -> None:
        # Replaces the distribution before the value is drawn. Editing the value afterwards would be too late for a
        # trace further out, and poutine.mask cannot mask elements of an event.
        name, fn = msg["name"], msg["fn"]
        if msg["infer"].get("is_auxiliary") and name not in self.mask and not _knows_masks(fn):
            site = name.removesuffix("_unconstrained")  # AutoNormal draws at this name; the site itself is a Delta
            self._draws[site] = name
            if site == name or site not in self.mask:
                return
            name = site
        elif not msg["is_observed"]:
            self._sites.add(name)
        if name not in self.mask:
            return
        self._sites.add(name)
        if _knows_masks(fn):
            self._draws.clear()
            mask = self._of(name, fn.shape(), _device_of(msg, None), msg["infer"].get("pruned_by"))
        elif isinstance(fn, dist.Delta):
            self._check_draws(name)
            mask = self._of(name, fn.v.shape, fn.v.device, msg["infer"].get("pruned_by"))
            msg["fn"] = dist.Delta(torch.where(mask, fn.v, 0.0), fn.log_density, fn.event_dim)
        else:
            self._draws.clear()
            each, inner, dims = base(fn), None, fn.event_dim
            if each.event_shape:
                raise UserError(
                    f"site {name!r} has a {type(fn).__name__}, which cannot be pruned; only distributions per weight can"
                )
            if isinstance(each, Pruned):  # masked by an inner sparsify
                each, inner = each.base_dist, each._mask
            shape = each.batch_shape
            if dims and dims == self.mask[name].ndim:  # leading dimensions may be particles
                shape = shape[-dims:]
            mask = self._of(name, shape, _device_of(msg, each), inner)
            msg["fn"] = Pruned(each, mask).to_event(dims)
        # A draw of local reparameterization is already pruned, and layers recognise it by its identity.
        kept = None if msg["value"] is None else kept_of(msg["value"])
        pruned = (
            msg["infer"].get("pruned_by") is mask
            or "by_layers" in msg["infer"]
            or (kept and kept.mask is mask and _AS_DRAWN in msg["infer"])
        )
        if msg["value"] is not None and not pruned:
            # The value was set from outside: by a condition, a sampler's step, or the replay of an unmasked guide.
            # masked_fill keeps the memory layout, on which the bits of convolutions depend.
            msg["value"] = with_kept(msg["value"].masked_fill(~mask, 0.0), mask)
        every = (*msg["infer"].get("pruned_by_all", ()), self.mask[name])
        msg["infer"] = msg["infer"] | {"pruned_by": mask, "pruned_by_all": every}

    def _pyro_post_sample(self, msg: Any) -> None:
        mask = self.mask.get(msg["name"])
        if mask is None:
            return
        kept = kept_of(msg["value"])
        if kept is not None and kept.mask is mask and _AS_DRAWN in msg["infer"]:
            return
        infer = msg["infer"]
        met = any(each is mask for each in infer.get("pruned_by_all", ())) or {"by_layers", "pruned_by"} <= infer.keys()
        if msg["is_observed"] or not met:
            # An outer handler set the value, perhaps one that another mask has pruned, after this one masked the distribution.
            msg["value"] = msg["value"].masked_fill(~mask.to(msg["value"].device), 0.0)
        if kept_of(msg["value"]) is None and msg["value"].shape == mask.shape:
            with_kept(msg["value"], mask)

    def _check_draws(self, name: str) -> None:
        """Raise ``UserError`` for a site whose values come from a joint draw that cannot be masked."""
        joint = [draw for site, draw in self._draws.items() if site == draw]
        if name not in self._draws and joint:
            raise UserError(
                f"the guide draws all weights from {joint[-1]!r}, which cannot be masked; use mean_field, or guides.auto with "
                "AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal or AutoLowRankMultivariateNormal"
            )


class _Again(SparsifyMessenger):
    """A copy of a handler that acts where the original is hidden; both share their masks and records."""

    def __enter__(self) -> Self:
        OwnHandler.__enter__(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        OwnHandler.__exit__(self, *exception)


def _knows_masks(fn: Any) -> bool:
    return getattr(base(fn), "knows_masks", False)


def _device_of(msg: Any, distribution: Any) -> torch.device | None:
    if msg["value"] is not None:
        return msg["value"].device
    if distribution is None:
        return None
    for value in vars(distribution).values():
        if isinstance(value, Tensor):
            return value.device
    return _device_of(msg, getattr(distribution, "base_dist", None))


def as_drawn(fn: Any = None) -> Any:
    """Say of the values that a condition or replay sets in ``fn``, or within this context, that they are, unchanged, draws of a
    guide: those that it drew under the same mask are not pruned again.
    """
    config: Any = {_AS_DRAWN: True}
    return poutine.infer_config(fn, config_fn=lambda site: config)


def are_as_drawn(values: Mapping[str, Tensor]) -> bool:
    """Whether conditioning a network on ``values``, by site and of the sites' shapes, would change none of them here.

    That is so for a guide's draws under the masks of the enclosing ``sparsify``, if nobody changed them and no other handler acts.
    """
    if not all(isinstance(handler, SparsifyMessenger) for handler in _PYRO_STACK):
        return False
    for name, value in values.items():
        mask, kept = active_mask(name, value.shape, value.device), kept_of(value)
        if mask is not None and (kept is None or kept.mask is not mask or not kept.is_unchanged(value)):
            return False
    return True


def sparsify(mask: Mask) -> SparsifyMessenger:
    """Set every pruned weight to exactly 0 in all samples of guide and prior, within this context or a decorated callable.

    A pruned weight has (μ, σ) = (0, 0) (paper §3) and adds exactly 0 to the KL divergence. Values that are set from
    outside are pruned too: those of a condition, of a replay, and of MCMC proposals. Pyro's HMC and NUTS need a density
    for every dimension, so they sample a standard normal in place of a pruned weight; their samples show it as 0.
    Nested masks prune a weight if any of them does. A mask acts only on the thread that enters it.

    ``mask`` holds a bool tensor per site, with the site's shape; sites that are not in it stay as they are. Raises
    ``UserError`` if a name in ``mask`` matches no sampled site, if a shape is wrong, or if it holds other numbers than 0 and 1.
    """
    return SparsifyMessenger(mask)
