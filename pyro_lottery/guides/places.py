"""The sites of a model as a guide sees them: their plates, their supports and their initial values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Transform

from pyro_lottery.distributions import PointMass
from pyro_lottery.errors import UserError
from pyro_lottery.guides.supports import check_real, transform_of
from pyro_lottery.handlers import left_out
from pyro_lottery.threads import TURN

Select = Callable[[Tensor], Tensor] | None
"""A function that takes a subsample's part of a tensor shaped like a site's parameters; None where all of it is used."""


@dataclass(frozen=True)
class Place:
    """A site's plates, support and event dimensions in the model of a guide."""

    shape: Size
    """Shape of a value; of a subsample's values, if its plates are subsampled."""
    event_dim: int
    """Event dimensions of a value."""
    real_dim: int
    """Event dimensions of the parameters, which differ for supports such as a simplex or triangular matrices."""
    frames: tuple[CondIndepStackFrame, ...]
    transform: Transform | None
    """From the parameters' space to the support; None for all real numbers."""

    @classmethod
    def of(cls, site: Any) -> Place:
        """The place of a site of a model's trace."""
        value, event_dim, transform = site["value"], site["fn"].event_dim, transform_of(site["name"], site["fn"])
        more = 0 if transform is None else len(transform.inverse_shape(value.shape)) - value.dim()
        frames = tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized)
        return cls(value.shape, event_dim, event_dim + more, frames, transform)

    @property
    def real_shape(self) -> Size:
        """Shape of the parameters; of a subsample's, if the site's plates are subsampled."""
        return self.shape if self.transform is None else Size(self.transform.inverse_shape(self.shape))

    @property
    def unprunable(self) -> str:
        """The reason why the site cannot be masked; empty if it can."""
        if self.transform is not None:
            return "is not over all real numbers"
        subsampled = any(whole(frame) != frame.size for frame in self.frames)
        return "is in a subsampled plate, of whose entries a model sees some" if subsampled else ""

    def loc_of(self, value: Tensor) -> Tensor:
        """The parameters at a value of the model, repeated so that they fill whole plates."""
        loc = self.real_of(value)
        for frame in self.frames:
            if whole(frame) != frame.size:
                loc = periodic_repeat(loc, whole(frame), self._dim(frame))
        return loc

    def _dim(self, frame: CondIndepStackFrame) -> int:
        assert frame.dim is not None  # of a vectorized plate
        return frame.dim - self.real_dim

    @property
    def decreasing(self) -> bool:
        """Whether the map to the support is decreasing, as it is for numbers below a bound."""
        try:
            return self.transform is not None and bool((torch.as_tensor(self.transform.sign) < 0).all())
        except NotImplementedError:  # of a map that mixes its entries
            return False

    def real_of(self, value: Tensor) -> Tensor:
        """The parameters at a value of the site."""
        return value if self.transform is None else self.transform.inv(value)

    def value_of(self, loc: Tensor) -> Tensor:
        """The value of the site at parameters."""
        return loc if self.transform is None else self.transform(loc)

    def enter(self, stack: ExitStack, plates: Mapping[str, Any], given: bool) -> Select:
        """Enter the site's plates; ``given`` says that the user made them, perhaps with other indices than 0, 1, 2, ..."""
        chosen = {}
        for frame in self.frames:
            index = stack.enter_context(plates[frame.name])
            if given or len(index) < whole(frame):
                chosen[self._dim(frame)] = index
        if not chosen:
            return None

        def select(value: Tensor) -> Tensor:
            for dim, index in chosen.items():
                value = value.index_select(dim, index.to(value.device))
            return value

        return select

    def distribution(self, each: Any) -> dist.TorchDistribution:
        """The site's distribution from that of each parameter, or a point mass from a tensor of the parameters."""
        if isinstance(each, Tensor):
            return PointMass(self.value_of(each), event_dim=self.event_dim)
        each = each.to_event(self.real_dim)
        # With a cache, so that the log-density is of the very number that was drawn.
        return each if self.transform is None else dist.TransformedDistribution(each, [self.transform.with_cache()])


def whole(frame: CondIndepStackFrame) -> int:
    """The size of a whole plate; a subsample of it may be smaller."""
    return frame.full_size or frame.size


def initial_value(model: Any) -> Callable[[Any], Tensor]:
    """A function from a Pyro site to its initial value: the network's own, or else the prior's median."""
    values = model.initial_values() if hasattr(model, "initial_values") else {}

    def of(site: Any) -> Tensor:
        name = site["name"]
        # Cloned, or training would overwrite the initial values in place.
        return values[name].detach().clone() if name in values else init_to_median(site)

    return of


def traced_sites(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, Any]]:
    """The random sites of a model at their initial values, from a trace of the model called with ``args``."""
    with TURN, torch.no_grad(), poutine.block(), left_out():
        trace = poutine.trace(InitMessenger(initial_value(model))(model)).get_trace(*args, **kwargs)
    return [(name, site) for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]


def continuous_sites(model: Callable[..., Any], *prototype_args: Any) -> dict[str, Any]:
    """The random sites of a model at their initial values; raises ``UserError`` for one that is not continuous."""
    weights = getattr(model, "kaiming_scale", {})  # of a network; any of them may be pruned
    sites = dict(traced_sites(model, *prototype_args))
    if not sites:
        raise UserError("the model has no latent sites for a guide; give it at least one pyro.sample without obs")
    for name, site in sites.items():
        if name in weights:
            check_real(name, site["fn"])
        transform_of(name, site["fn"])
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized and whole(frame) != frame.size:
                raise UserError(f"site {name!r} is in {frame.name!r}, a loop over a subsample; use `with pyro.plate`")
    return sites


def check_unmasked(masks: Mapping[str, Tensor | None], unprunable: Mapping[str, str]) -> None:
    """Raise ``UserError`` with the reason for a mask of a site that cannot have one."""
    for name, reason in unprunable.items():
        if masks[name] is not None:
            raise UserError(f"site {name!r} {reason}, so it cannot be pruned; leave it out of the mask")
