"""``sparsify``: pruned weights are exactly zero and cost exactly nothing."""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.poutine.runtime import effectful
from torch import Size, Tensor

from pyro_lottery.distributions import Pruned, base
from pyro_lottery.errors import UserError
from pyro_lottery.threads import OwnHandler
from pyro_lottery.types import Mask


@effectful(type="active_mask")
def active_mask(site: str, shape: Size, device: torch.device | None = None) -> Tensor | None:
    """The mask that the enclosing ``sparsify`` has for ``site``, or None: the same object each time.

    A guide that draws several sites as one vector asks this, since no handler can mask within a joint distribution.
    """
    return None


@effectful(type="masks_met")
def _masks_met() -> frozenset[int]:
    """The mask dicts of the ``sparsify`` handlers that a site would meet here, by identity."""
    return frozenset()


class _OfThread(threading.local):
    """What differs between threads."""

    def __init__(self) -> None:
        self.entered: list[SparsifyMessenger] = []


_mine = _OfThread()


@contextmanager
def not_hidden() -> Iterator[None]:
    """Within this context the enclosing ``sparsify`` handlers act that ``poutine.block`` hides.

    Pyro's ``MCMC.run`` and ``Importance.run`` hide whatever surrounds them, and would sample a dense network under a mask.
    """
    met = _masks_met() if _mine.entered else frozenset()
    with ExitStack() as stack:
        for handler in _mine.entered:
            if id(handler.mask) not in met:
                stack.enter_context(handler._again())
        yield


@contextmanager
def left_out() -> Iterator[None]:
    """Within this context :func:`not_hidden` brings back no mask: a guide that asks a model for its sites wants all weights."""
    hidden, _mine.entered = _mine.entered, []
    try:
        yield
    finally:
        _mine.entered = hidden


class SparsifyMessenger(OwnHandler):
    """The effect behind :func:`sparsify`."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.mask = {name: m.bool().clone() for name, m in mask.items()}  # later changes to the caller's have no effect
        self._joined: dict[str, tuple[Tensor, Tensor]] = {}  # an inner handler's mask, and what it shares with ours
        self._sites: set[str] = set()  # every random site met, to tell a misspelt mask from an unused one
        self._draws: dict[str, str] = {}  # of the guide that runs: its auxiliary draws, by the site that each is for

    def __enter__(self) -> Self:
        super().__enter__()
        _mine.entered.append(self)
        return self

    def _again(self) -> _Again:
        """The same handler, to be entered a second time."""
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
                "no random site was met under this mask; inference that hides what surrounds it, as Pyro's MCMC does, takes "
                "the masked model: NUTS(sparsify(mask)(model))"
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
        """The mask of a site, together with that of an ``inner`` handler: the same object each time."""
        mask = self.mask[name]
        if mask.shape != shape:
            raise UserError(f"the mask of site {name!r} is {tuple(mask.shape)}, but the site is {tuple(shape)}")
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
        # Acts before the value is drawn and changes the distribution itself: a handler that edits the value
        # afterwards would come too late for a trace further out, and poutine.mask cannot reach inside an event.
        name, fn = msg["name"], msg["fn"]
        if msg["infer"].get("is_auxiliary") and name not in self.mask and not _knows_masks(fn):
            site = name.removesuffix("_unconstrained")  # AutoNormal's real draw; the named site is its Delta
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
                raise UserError(f"site {name!r}: a {type(fn).__name__} has no distribution per weight to prune")
            if isinstance(each, Pruned):  # by a sparsify within this one
                each, inner = each.base_dist, each._mask
            shape = each.batch_shape
            if dims and dims == self.mask[name].ndim:  # beside the event there may be particles
                shape = shape[-dims:]
            mask = self._of(name, shape, _device_of(msg, each), inner)
            msg["fn"] = Pruned(each, mask).to_event(dims)
        # A draw of local reparameterization is pruned already, and layers know it by the tensor that it is.
        pruned = msg["infer"].get("pruned_by") is mask or "by_layers" in msg["infer"]
        if msg["value"] is not None and not pruned:
            # Somebody has set it: a condition, a sampler's step, the replay of a guide that is not masked.
            msg["value"] = msg["value"].masked_fill(~mask, 0.0)  # which keeps its layout, and convolutions their bits
        msg["infer"] = msg["infer"] | {"pruned_by": mask}

    def _pyro_post_sample(self, msg: Any) -> None:
        mask = self.mask.get(msg["name"])
        if mask is not None and (msg["is_observed"] or "pruned_by" not in msg["infer"]):
            # A handler around this one has set the value, after the distribution was masked.
            msg["value"] = msg["value"].masked_fill(~mask.to(msg["value"].device), 0.0)

    def _check_draws(self, name: str) -> None:
        """Raise ``UserError`` for a site that its guide takes from a draw in which no weight can be pruned."""
        joint = [draw for site, draw in self._draws.items() if site == draw]
        if name not in self._draws and joint:
            raise UserError(
                f"the guide draws its weights from {joint[-1]!r}, in which pruned ones cannot be masked; use mean_field, or "
                "guides.auto with AutoNormal, AutoDiagonalNormal or AutoMultivariateNormal, full or low-rank"
            )


class _Again(SparsifyMessenger):
    """A handler that acts where the one it is a copy of is hidden; it shares that one's masks and what it has met."""

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


def sparsify(mask: Mask) -> SparsifyMessenger:
    """Within this context (or for a callable it decorates) every pruned weight is exactly zero in every sample of the
    guide and of the prior, and adds exactly 0 to the KL divergence (paper §3: a pruned weight has (μ, σ) = (0, 0)).

    A value that somebody else sets is pruned too: a condition's, a replayed one, what MCMC tries. Pyro's HMC and NUTS
    need a density of every number, so that they draw a standard normal one in a pruned weight's place, which their
    samples show as 0. Nested masks prune what any of them prunes. A mask acts on the thread that enters it.

    ``mask``: one bool tensor per site, shaped like the site; sites without one are left alone. A name that no
    sampled site answers to, or a wrong shape, raises ``UserError``.
    """
    return SparsifyMessenger(mask)
