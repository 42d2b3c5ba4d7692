"""The variational families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import Transform, biject_to

from pyro_lottery.distributions import Draw, PointMass, SiteNormal
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import active_mask
from pyro_lottery.kernels import Layout
from pyro_lottery.kernels.layout import flatten
from pyro_lottery.own_parameters import keep_parameters_


def model_of(guide: AutoGuide) -> Any:
    """The model that a guide was built for, without the handlers around it.

    Pyro's ``unwrap`` does not find it in a copy of a guide.
    """
    found: Any = guide.model
    while isinstance(found, partial):
        handled = len(found.args) > 1 and isinstance(found.args[0], Messenger)
        found = found.args[1] if handled else found.func
    return found


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
    def unprunable(self) -> str:
        """Why the site cannot be masked; empty if it can."""
        if self.transform is not None:
            return "is not over all real numbers"
        subsampled = any((frame.full_size or frame.size) != frame.size for frame in self.frames)
        return "is in a subsampled plate, of whose entries a model sees some" if subsampled else ""

    def loc_of(self, value: Tensor) -> Tensor:
        """The parameters at a value of the model's, repeated to whole plates."""
        loc = value if self.transform is None else self.transform.inv(value)
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


def normal_quantiles(quantiles: Any, like: Tensor) -> Tensor:
    """Quantiles of N(0, 1) for numbers between 0 and 1, which others raise ``UserError``."""
    numbers = torch.as_tensor(quantiles, dtype=like.dtype, device=like.device).reshape(-1)
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise UserError(f"quantiles are between 0 and 1, got {quantiles}")
    return torch.special.ndtri(numbers)


class Tempered(AutoGuide):
    """What every guide of this package shares: parameters of its own, the KL temperature on its sites, and copies that
    leave it unharmed.
    """

    @property
    def _temperature(self) -> float:
        return getattr(model_of(self), "kl_temperature", 1.0)  # the model's, at each call: it may be changed

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        keep_parameters_(self)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # The prior's sites carry the same factor: together they are T·KL, for any estimator of the ELBO.
        with poutine.scale(scale=self._temperature):
            return super().forward(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own sets the living guide's model to None.
        return self.__dict__ | {"master": None}


class FlatGuide(Tempered):
    """A guide with one independent site per weight tensor, whose parameters are flat vectors over all of them.

    Complete from the start: the model is asked for its sites without data, or with ``prototype_args``. The state dict
    holds one tensor per site and parameter, shaped like the site: ``loc.<site>``.

    Sites inside plates have parameters over the whole plate, of which a subsample uses its part; ``create_plates`` is
    Pyro's, a function of the model's arguments that returns plates to use instead of new ones. Parameters of a site
    over less than the real line (positive numbers, a simplex) are those of its image under ``biject_to(support)``, so
    they are unconstrained; such a site cannot be pruned, and a network's own weights must be over all real numbers.
    """

    flat: ClassVar[tuple[str, ...]] = ("loc",)
    """Names of the flat parameters."""

    def __init__(self, model: Callable[..., Any], *prototype_args: Any, create_plates: Any = None):
        super().__init__(model, create_plates=create_plates)
        sites = continuous_sites(model, *prototype_args)
        self.places = {name: Place.of(site) for name, site in sites.items()}
        values = {name: place.loc_of(sites[name]["value"]) for name, place in self.places.items()}
        self.shapes: dict[str, Size] = {name: value.shape for name, value in values.items()}
        """Of each site's parameters."""
        self._unprunable = {name: why for name, place in self.places.items() if (why := place.unprunable)}
        self._prototype_frames = {frame.name: frame for place in self.places.values() for frame in place.frames}
        self.layout = Layout(list(self.shapes.values()))
        """Of the parameters: of all weights, or within :func:`compressed` of those that the masks keep."""
        self._masked = self.layout  # the layout of the masks last met by a guide that is not compressed
        self.loc = nn.Parameter(torch.cat([flatten(value) for value in values.values()]).clone())

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Every site's view of a vector laid out like the parameters; zeros where a compressed guide keeps nothing."""
        return dict(zip(self.shapes, self.layout.views(self.layout.scatter(flat)), strict=True))

    def under_masks(self) -> tuple[Layout, list[Tensor]]:
        """The layout that the enclosing ``sparsify`` leaves, and the parameters of the weights in it."""
        masks = tuple(active_mask(name, shape, self.loc.device) for name, shape in self.shapes.items())
        if self._unprunable:
            check_unmasked(dict(zip(self.shapes, masks, strict=True)), self._unprunable)
        parameters = [getattr(self, name) for name in self.flat]
        if _same(masks, self.layout.masks):
            self.layout.masks = masks  # so that the next comparison is of objects, and a GPU is not waited for
            return self.layout, parameters
        if self.layout.index is not None:
            raise UserError("this guide keeps only the weights of another mask until its training ends")
        if not _same(masks, self._masked.masks):
            self._masked = Layout(self.layout.shapes, masks, self.loc.device)
        self._masked.masks = masks
        return self._masked, [self._masked.keep(p) for p in parameters]

    def draw(self, distribution: Callable[[int, Select], Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site inside its plates from ``distribution(number, select)``: per weight of the site's parameters,
        of which ``select`` takes the subsample's part.
        """
        plates = self._create_plates(*args, **kwargs) if self._prototype_frames else {}
        values = {}
        with poutine.scale(scale=self._temperature):
            for number, (name, place) in enumerate(self.places.items()):
                with ExitStack() as stack:
                    select = place.enter(stack, plates, self.create_plates is not None)
                    values[name] = pyro.sample(name, place.distribution(distribution(number, select)))
        return values

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every site, shaped like its parameters; 0 where the enclosing ``sparsify`` prunes."""
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles [n, *shape] of every weight for n numbers between 0 and 1; 0 where ``sparsify`` prunes.

        Of a simplex and the like, whose entries depend on each other, the image of the parameters' quantiles, as in Pyro.
        """
        layout, (loc, *log_scale) = self.under_masks()
        steps = normal_quantiles(quantiles, loc)
        locs = layout.views(layout.scatter(loc))
        scales = layout.views(layout.scatter(log_scale[0].exp())) if log_scale else [torch.zeros_like(v) for v in locs]
        found = {}
        for (name, place), at, scale in zip(self.places.items(), locs, scales, strict=True):
            step = (-steps if place.decreasing else steps).reshape(-1, *[1] * at.dim())
            found[name] = place.value_of(torch.where(scale > 0, at + step * scale, at))
        return found

    def compress_(self) -> tuple[Layout, dict[str, nn.Parameter]]:
        """Keep only the weights that the enclosing ``sparsify`` leaves as parameters; returns what :meth:`expand_` needs."""
        layout, kept = self.under_masks()
        before = self.layout, {name: getattr(self, name) for name in self.flat}
        if layout is not self.layout:
            self.layout = layout
            for name, values in zip(self.flat, kept, strict=True):
                dense = before[1][name]
                self._set(name, nn.Parameter(values.detach().clone(), requires_grad=dense.requires_grad))
        return before

    @torch.no_grad()
    def expand_(self, before: tuple[Layout, dict[str, nn.Parameter]]) -> None:
        """Undo :meth:`compress_`: trained values go where they belong; the loc of every pruned weight becomes 0."""
        for name, parameter in before[1].items():
            kept = getattr(self, name)
            if kept is not parameter:
                if name == "loc":
                    parameter.zero_()
                assert self.layout.index is not None
                parameter.index_copy_(0, self.layout.index, kept)
                parameter.grad = None
                self._set(name, parameter)
        self.layout = before[0]

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        # Not by setattr: Pyro would delete whatever has this name in its global store, a user's own "loc" perhaps.
        self._parameters[name] = parameter

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self.flat:
            parameter = getattr(self, name)
            for site, value in self.unpack(parameter if keep_vars else parameter.detach()).items():
                destination[f"{prefix}{name}.{site}"] = value

    @torch.no_grad()
    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str],
        errors: list[str],
    ) -> None:  # fmt: skip
        expected = {f"{prefix}{name}.{site}": shape for name in self.flat for site, shape in self.shapes.items()}
        absent = [key for key in expected if key not in state]
        missing += absent
        unexpected += [key for key in state if key.startswith(prefix) and key not in expected]
        wrong = [key for key, shape in expected.items() if key in state and state[key].shape != shape]
        errors += [f"{key} is {tuple(state[key].shape)}, but the site is {tuple(expected[key])}" for key in wrong]
        if absent or wrong:
            return
        for name in self.flat:
            values = [flatten(state[f"{prefix}{name}.{site}"]) for site in self.shapes]
            parameter = getattr(self, name)
            parameter.copy_(self.layout.keep(torch.cat(values).to(parameter.device)))


class MeanField(FlatGuide):
    """q(w) = Π N(w; loc, scale²): one Normal site per weight tensor, scale = exp(log_scale) (paper §3).

    What Pyro's AutoNormal is, from two flat parameters: all samples and all their gradients are one pass over memory.
    Under ``sparsify`` only what the mask keeps is drawn; see :func:`compressed` for its training.
    """

    flat = ("loc", "log_scale")

    def __init__(self, model: Callable[..., Any], init_scale: float, *prototype_args: Any, create_plates: Any = None):
        super().__init__(model, *prototype_args, create_plates=create_plates)
        if not init_scale > 0:
            raise UserError(f"init_scale must be greater than 0, got {init_scale}")
        kaiming = getattr(model, "kaiming_scale", {})
        scales = [
            torch.full((size,), init_scale * kaiming.get(name, 1.0))
            for name, size in zip(self.shapes, self.layout.sizes, strict=True)
        ]
        self.log_scale = nn.Parameter(torch.cat(scales).to(self.loc).log())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        layout, (loc, log_scale) = self.under_masks()
        draw = Draw(loc, log_scale, layout)

        def normal(number: int, select: Select) -> dist.TorchDistribution:
            return SiteNormal(draw, number) if select is None else draw.part(number, select)

        return self.draw(normal, *args, **kwargs)


class Point(FlatGuide):
    """A Delta at loc for every site: maximum likelihood under ``priors.flat``, MAP under any other prior."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        layout, (loc,) = self.under_masks()
        values = layout.views(layout.scatter(loc))
        return self.draw(lambda number, select: values[number] if select is None else select(values[number]), *args)


class Joint(Tempered, AutoContinuous):
    """For Pyro's guides that draw all weights as one vector: under a mask, the marginal of the surviving weights."""

    def unmasked(self) -> dist.TorchDistribution:
        """The joint distribution of all weights, whatever the mask."""
        return super().get_posterior()

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        joint = super().get_posterior(*args, **kwargs)
        shapes = latent_shapes(self)
        masks = {name: active_mask(name, shape) for name, shape in shapes.items()}
        if all(mask is None for mask in masks.values()):
            return joint
        parts = [
            torch.ones(shapes[name].numel(), dtype=torch.bool) if mask is None else mask.reshape(-1)
            for name, mask in masks.items()
        ]
        device = next(self.parameters()).device
        return _Surviving(joint, torch.cat([part.to(device) for part in parts]))


class _Surviving(dist.TorchDistribution):
    """The marginal of a joint Gaussian over the weights that a mask keeps, as a vector with zeros elsewhere."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True
    knows_masks = True

    def __init__(self, joint: dist.TorchDistribution, mask: Tensor):
        self.index = mask.nonzero().squeeze(1)
        self.size = len(mask)
        self.marginal = _marginal(joint, self.index)
        super().__init__(event_shape=Size((self.size,)), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        values = self.marginal.rsample(sample_shape)
        return values.new_zeros(*sample_shape, self.size).index_copy(-1, self.index, values)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.marginal.log_prob(value[..., self.index])


def _marginal(joint: dist.TorchDistribution, index: Tensor) -> dist.TorchDistribution:
    if isinstance(joint, dist.Independent) and isinstance(joint.base_dist, dist.Normal):
        return dist.Normal(joint.base_dist.loc[index], joint.base_dist.scale[index]).to_event(1)
    if isinstance(joint, dist.MultivariateNormal):
        rows = joint.scale_tril[index]
        return dist.MultivariateNormal(joint.loc[index], covariance_matrix=rows @ rows.mT)
    if isinstance(joint, dist.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(joint.loc[index], joint.cov_factor[index], joint.cov_diag[index])
    raise UserError(
        f"a {type(joint).__name__} guide has no closed-form marginal over the surviving weights, so it cannot be pruned; "
        "use mean_field, AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal or AutoMultivariateNormal"
    )


def latent_shapes(guide: AutoContinuous) -> dict[str, Size]:
    """The shapes of the sites that a joint guide draws as one vector."""
    trace: Any = guide.prototype_trace  # as it is: this is asked at every step
    return {name: site["value"].shape for name, site in trace.iter_stochastic_nodes()}


def prototype(guide: AutoGuide) -> Any:
    """The trace that one of Pyro's guides took of its model; ``UserError`` if there is none yet, or of a network's weight
    that is not over all real numbers.
    """
    if guide.prototype_trace is None:
        raise UserError(
            f"this {type(guide).__name__} has not met its model yet; build it with pyro_lottery.guides.auto"
        )
    weights = getattr(model_of(guide), "kaiming_scale", {})
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        if name in weights:
            _check_real(name, site["fn"])  # or loc would be read in another space than samples are drawn in
    return guide.prototype_trace


def initial_value(model: Any) -> Callable[[Any], Tensor]:
    """A function from a Pyro site to its initial loc: the network's own value, or else the prior's median."""
    values = model.initial_values() if hasattr(model, "initial_values") else {}

    def of(site: Any) -> Tensor:
        name = site["name"]
        # Cloned, or training would overwrite the initial values in place.
        return values[name].detach().clone() if name in values else init_to_median(site)

    return of


def random_sites(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, Any]]:
    """The random sites of a model at their initial values, as Pyro traces them when the model is called with ``args``."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(InitMessenger(initial_value(model))(model)).get_trace(*args, **kwargs)
    return [(name, site) for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]


def continuous_sites(model: Callable[..., Any], *prototype_args: Any) -> dict[str, Any]:
    """The random sites of a model at their initial values; ``UserError`` for one that no guide of real numbers covers."""
    weights = getattr(model, "kaiming_scale", {})  # of a network; any of them may be pruned
    sites = dict(random_sites(model, *prototype_args))
    for name, site in sites.items():
        if name in weights:
            _check_real(name, site["fn"])
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


def _check_real(site: str, distribution: Any) -> None:
    support = _base_constraint(distribution)
    if support is not constraints.real:
        raise UserError(
            f"the prior of {site!r} is over {support}, not all real numbers, on which a weight is pruned to exactly 0; "
            "choose one like normal, laplace or student_t"
        )


def _same(masks: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]) -> bool:
    return all(
        a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))
        for a, b in zip(masks, others, strict=True)
    )
