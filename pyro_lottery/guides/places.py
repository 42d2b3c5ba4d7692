"""The sites of a model as a guide sees them: their plates, their supports and where they start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Transform, biject_to

from pyro_lottery.distributions import PointMass
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import left_out
from pyro_lottery.threads import TURN

Select = Callable[[Tensor], Tensor] | None
"""Takes a subsample's part of a tensor shaped like a site's parameters; None takes all of it."""


@dataclass(frozen=True)
class Place:
    """Where a site of a guide is in its model: its plates, its support, and which of its dimensions are one event."""

    shape: Size
    """Of a value; within a subsample, if its plates are subsampled."""
    event_dim: int
    """Of a value."""
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
        """Of the parameters; within a subsample, if the site's plates are subsampled."""
        return self.shape if self.transform is None else Size(self.transform.inverse_shape(self.shape))

    @property
    def unprunable(self) -> str:
        """Why the site cannot be masked; empty if it can."""
        if self.transform is not None:
            return "is not over all real numbers"
        subsampled = any((frame.full_size or frame.size) != frame.size for frame in self.frames)
        return "is in a subsampled plate, of whose entries a model sees some" if subsampled else ""

    def loc_of(self, value: Tensor) -> Tensor:
        """The parameters at a value of the model's, repeated to whole plates."""
        loc = self.real_of(value)
        for frame in self.frames:
            size = frame.full_size or frame.size
            if size != frame.size:
                loc = periodic_repeat(loc, size, self._dim(frame))
        return loc

    def _dim(self, frame: CondIndepStackFrame) -> int:
        assert frame.dim is not None  # of a vectorized plate
        return frame.dim - self.real_dim

    @property
    def decreasing(self) -> bool:
        """Whether the support is reached by a decreasing map, as numbers below a bound are."""
        try:
            return self.transform is not None and bool((torch.as_tensor(self.transform.sign) < 0).all())
        except NotImplementedError:  # of a map that mixes its entries
            return False

    def real_of(self, value: Tensor) -> Tensor:
        """The parameters at a value, as they are."""
        return value if self.transform is None else self.transform.inv(value)

    def value_of(self, loc: Tensor) -> Tensor:
        """Values at parameters."""
        return loc if self.transform is None else self.transform(loc)

    def enter(self, stack: ExitStack, plates: Mapping[str, Any], given: bool) -> Select:
        """Enter the site's plates; ``given`` are those that a user has made, perhaps with indices of his own."""
        chosen = {}
        for frame in self.frames:
            index = stack.enter_context(plates[frame.name])
            if given or len(index) < (frame.full_size or frame.size):
                chosen[self._dim(frame)] = index
        if not chosen:
            return None

        def select(value: Tensor) -> Tensor:
            for dim, index in chosen.items():
                value = value.index_select(dim, index.to(value.device))
            return value

        return select

    def distribution(self, each: Any) -> dist.TorchDistribution:
        """The site's distribution from one per parameter, or from a tensor of them for a point mass."""
        if isinstance(each, Tensor):
            return PointMass(self.value_of(each), event_dim=self.event_dim)
        each = each.to_event(self.real_dim)
        # Cached, so that the log-density is of the very number that was drawn.
        return each if self.transform is None else dist.TransformedDistribution(each, [self.transform.with_cache()])


def initial_value(model: Any) -> Callable[[Any], Tensor]:
    """A function from a Pyro site to its initial loc: the network's own value, or else the prior's median."""
    values = model.initial_values() if hasattr(model, "initial_values") else {}

    def of(site: Any) -> Tensor:
        name = site["name"]
        # Cloned, or training would overwrite the initial values in place.
        return values[name].detach().clone() if name in values else init_to_median(site)

    return of


def traced_sites(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, Any]]:
    """The random sites of a model at their initial values, as Pyro traces them when the model is called with ``args``."""
    with TURN, torch.no_grad(), poutine.block(), left_out():
        trace = poutine.trace(InitMessenger(initial_value(model))(model)).get_trace(*args, **kwargs)
    return [(name, site) for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]


def continuous_sites(model: Callable[..., Any], *prototype_args: Any) -> dict[str, Any]:
    """The random sites of a model at their initial values; ``UserError`` for one that no guide of real numbers covers."""
    weights = getattr(model, "kaiming_scale", {})  # of a network; any of them may be pruned
    sites = dict(traced_sites(model, *prototype_args))
    if not sites:
        raise UserError("the model samples no site for a guide to cover")
    for name, site in sites.items():
        if name in weights:
            check_real(name, site["fn"])
        transform_of(name, site["fn"])
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized and (frame.full_size or frame.size) != frame.size:
                raise UserError(f"site {name!r} is in {frame.name!r}, a loop over a subsample; use `with pyro.plate`")
    return sites


def transform_of(site: str, distribution: Any) -> Transform | None:
    """The map from the real numbers to a site's support; None if that is all real numbers."""
    if _base_constraint(distribution) is constraints.real:
        return None
    try:
        return biject_to(distribution.support)
    except NotImplementedError as error:
        raise UserError(
            f"site {site!r} is over {distribution.support}, which no map reaches from the real numbers; enumerate a "
            "discrete site, and hide it from the guide with pyro.poutine.block"
        ) from error


def check_unmasked(masks: Mapping[str, Tensor | None], unprunable: Mapping[str, str]) -> None:
    """Raise ``UserError`` for a mask of a site that cannot have one, with the reason."""
    for name, reason in unprunable.items():
        if masks[name] is not None:
            raise UserError(f"site {name!r} {reason}, so its values cannot be pruned to exactly 0")


def _base_constraint(distribution: Any) -> Any:
    support = distribution.support
    while hasattr(support, "base_constraint"):  # of an independent one, or of a mixture
        support = support.base_constraint
    return support


def check_real(site: str, distribution: Any) -> None:
    """Raise ``UserError`` for a distribution that is not over all real numbers."""
    support = _base_constraint(distribution)
    if support is not constraints.real:
        raise UserError(
            f"the prior of {site!r} is over {support}, not all real numbers, on which a weight is pruned to exactly 0; "
            "choose one like normal, laplace or student_t"
        )
