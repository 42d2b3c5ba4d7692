"""The variational families, and the one place that knows where a guide keeps loc and scale."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import ExpTransform
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuide, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.messenger import unwrap
from torch import Size, Tensor, nn
from torch.distributions import transform_to

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.handlers import active_mask
from pyro_lottery.imports import load_callable
from pyro_lottery.types import Mask, Posterior, Sites

_EXP = ExpTransform()


class _Tempered(AutoGuide):
    """What every guide of this package shares: the KL temperature on its sites, and copies that leave it unharmed."""

    _temperature = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # The prior's sites carry the same factor: together they are T·KL, for any estimator of the ELBO.
        with poutine.scale(scale=self._temperature):
            return super().forward(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own sets the living guide's model to None.
        return self.__dict__ | {"master": None}


class _Sites(AutoGuide):
    """A guide with one independent site per weight tensor, whose locs are one flat parameter.

    Complete from the start: the model is asked for its sites without data, or with ``prototype_args``.
    """

    def __init__(self, model: Callable[..., Any], *prototype_args: Any):
        super().__init__(model)
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(InitMessenger(_initial_value(model))(model)).get_trace(*prototype_args)
        self.shapes: dict[str, Size] = {}
        values = []
        for name, site in trace.iter_stochastic_nodes():
            if not _is_real(site["fn"].support):  # type: ignore[attr-defined]
                raise UserError(
                    f"site {name!r} is not real-valued; use guides.auto with Pyro's AutoNormal, which transforms it"
                )
            if any(frame.vectorized for frame in site["cond_indep_stack"]):
                raise UserError(f"site {name!r} is inside a plate; use guides.auto with Pyro's AutoNormal")
            value = site["value"]
            assert value is not None  # it has just been drawn
            self.shapes[name] = value.shape
            values.append(value.reshape(-1))
        self._sizes = [shape.numel() for shape in self.shapes.values()]
        self._temperature = getattr(model, "kl_temperature", 1.0)
        self.loc = nn.Parameter(torch.cat(values).clone())

    def unpack(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """``(site, view)`` for a flat vector; one split, since a slice per site would cost a full gradient each."""
        for (name, shape), part in zip(self.shapes.items(), flat.split(self._sizes), strict=True):
            yield name, part.view(shape)


class MeanField(_Tempered, _Sites):
    """q(w) = Π N(w; loc, scale²): one Normal site per weight tensor, scale = exp(log_scale) (paper §3)."""

    def __init__(self, model: Callable[..., Any], init_scale: float, *prototype_args: Any):
        _Sites.__init__(self, model, *prototype_args)
        if not init_scale > 0:
            raise UserError(f"init_scale must be greater than 0, got {init_scale}")
        kaiming = getattr(model, "kaiming_scale", {})
        scales = [
            torch.full((size,), init_scale * kaiming.get(name, 1.0))
            for name, size in zip(self.shapes, self._sizes, strict=True)
        ]
        self.log_scale = nn.Parameter(torch.cat(scales).to(self.loc).log())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        scales = self.unpack(self.log_scale.exp())
        with poutine.scale(scale=self._temperature):
            return {
                name: pyro.sample(name, dist.Normal(loc, scale).to_event(loc.dim()))
                for (name, loc), (_, scale) in zip(self.unpack(self.loc), scales, strict=True)
            }


class Point(_Tempered, _Sites):
    """A Delta at loc for every site: maximum likelihood under ``priors.flat``, MAP under any other prior."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with poutine.scale(scale=self._temperature):
            return {
                name: pyro.sample(name, dist.Delta(loc, event_dim=loc.dim())) for name, loc in self.unpack(self.loc)
            }


class _Joint(_Tempered, AutoContinuous):
    """For Pyro's guides that draw all weights as one vector: under a mask, the marginal of the surviving weights."""

    def unmasked(self) -> dist.TorchDistribution:
        """The joint distribution of all weights, whatever the mask."""
        return super().get_posterior()

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        joint = super().get_posterior(*args, **kwargs)
        shapes = _latent_shapes(self)
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


def mean_field(model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any) -> MeanField:
    """A mean-field Normal guide (paper §3): loc from the network's own initialisation, scale = ``init_scale`` times
    the Kaiming scale √(2/fan_in) of the layer.

    ``prototype_args`` are arguments with which a model that cannot run without data shows its sites.
    """
    return MeanField(model, init_scale, *prototype_args)


def deterministic(model: Callable[..., Any], *prototype_args: Any) -> Point:
    """A point guide: with ``priors.flat`` ordinary deterministic training, with another prior MAP."""
    return Point(model, *prototype_args)


def auto(kind: type[AutoGuide], model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any) -> AutoGuide:
    """One of Pyro's AutoGuides, started like :func:`mean_field` as far as it can be, ready for masks and the KL
    temperature, and with its parameters complete before the first batch.

    AutoNormal's scales start per layer; other guides take ``init_scale`` times the median Kaiming scale everywhere.
    """
    kaiming = getattr(model, "kaiming_scale", {})
    usual = init_scale * (float(torch.tensor(list(kaiming.values())).median()) if kaiming else 1.0)
    base = _Joint if issubclass(kind, AutoContinuous) else _Tempered
    adapted = type(kind.__name__, (base, kind), {})
    options: dict[str, Any] = {"init_loc_fn": _initial_value(model), "init_scale": usual}
    taken = inspect.signature(kind).parameters
    guide = adapted(model, **{name: value for name, value in options.items() if name in taken})
    guide._temperature = getattr(model, "kl_temperature", 1.0)
    with torch.no_grad(), poutine.block():
        guide(*prototype_args)
    device = next(iter(model.initial_values().values())).device if hasattr(model, "initial_values") else None
    if isinstance(guide, AutoNormal):
        scales = {n: torch.full_like(v, init_scale * kaiming.get(n, 1.0)) for n, v in _raw_locs(guide).items()}
        _set_scales(guide, scales)
    return guide.to(device) if device is not None else guide


def check_name(name: str) -> Any:
    """What a guide's command-line name or import path stands for; ``UserError`` if there is none."""
    known = {"mean_field": mean_field, "deterministic": deterministic}
    if name in known:
        return known[name]
    if "." not in name:
        raise unknown("guide", name, [*known, "package.module.AutoGuide"])
    return load_callable(name, "--guide")


def by_name(name: str, model: Callable[..., Any], init_scale: float) -> AutoGuide:
    """A guide from its command-line name, or from the import path of a Pyro AutoGuide or of ``model -> guide``."""
    kind = check_name(name)
    if isinstance(kind, type) and issubclass(kind, AutoGuide):
        return auto(kind, model, init_scale)
    guide = mean_field(model, init_scale) if kind is mean_field else kind(model)
    if not isinstance(guide, AutoGuide):
        raise UserError(
            f"--guide {name} gave a {type(guide).__name__}; expected a Pyro AutoGuide, or model -> AutoGuide"
        )
    return guide


def is_point(guide: AutoGuide) -> bool:
    """Whether every draw of ``guide`` is the same, so that one sample is enough."""
    return isinstance(guide, Point | AutoDelta)


@torch.no_grad()
def locs(guide: AutoGuide) -> Sites:
    """Copies of the loc of every site."""
    return {name: value.detach().clone() for name, value in _raw_locs(guide).items()}


@torch.no_grad()
def posterior(guide: AutoGuide) -> Posterior:
    """Copies of the marginal loc and scale of every site.

    For guides over one joint vector these are its mean and standard deviation, and ``extra`` keeps the guide's raw
    parameters, since loc and scale alone do not determine it.
    """
    loc = locs(guide)
    scale = None if is_point(guide) else {name: value.detach().clone() for name, value in _scales(guide).items()}
    extra = {n: t.detach().clone() for n, t in guide.state_dict().items()} if isinstance(guide, AutoContinuous) else {}
    return Posterior(loc, scale, tuple(getattr(unwrap(guide.model), "prunable", _matrices(loc))), extra)


@torch.no_grad()
def set_posterior_(guide: AutoGuide, posterior: Posterior) -> None:
    """Put loc and scale back into ``guide`` so that reading them again gives the same bits.

    A scale of 0 (a pruned weight) becomes 1, which no mask lets through. Missing, unknown or mis-shaped sites raise.
    """
    raw = _raw_locs(guide)
    for what, sites in (("loc", posterior.loc), ("scale", posterior.scale)):
        if sites is None:
            continue
        for name in dict.fromkeys([*raw, *sites]):
            if name not in sites or name not in raw:
                raise UserError(f"{what}/{name} is {'missing' if name not in sites else 'not a site of this network'}")
            if sites[name].shape != raw[name].shape:
                raise UserError(
                    f"{what}/{name} is {tuple(sites[name].shape)}, but the site is {tuple(raw[name].shape)}"
                )
    if isinstance(guide, AutoContinuous):
        if not posterior.extra:
            raise UserError(f"loc and scale do not determine a {type(guide).__name__}; its raw parameters are missing")
        guide.load_state_dict(dict(posterior.extra))
        return
    for name, value in raw.items():
        value.copy_(posterior.loc[name])
    if isinstance(guide, MeanField | AutoNormal):
        if posterior.scale is None:
            raise UserError(f"a {type(guide).__name__} needs scales, and this posterior has none")
        _set_scales(guide, posterior.scale)


@torch.no_grad()
def zero_pruned_(guide: AutoGuide, mask: Mask) -> None:
    """Set the loc of every pruned weight to exactly 0; its gradient and its weight decay are 0 from then on."""
    for name, value in _raw_locs(guide).items():
        if name in mask:
            value.mul_(mask[name].to(value.device))


def parameter_groups(model: nn.Module, guide: AutoGuide, weight_decay: float) -> list[dict[str, Any]]:
    """Adam's parameter groups: locs and the network's own parameters decay, scales do not.

    Decay of a log-scale would pull every scale towards 1, which no prior of the paper asks for.
    """
    locs = {id(value) for value in _loc_parameters(guide)}
    decayed = [p for p in guide.parameters() if id(p) in locs] + list(model.parameters())
    rest = [p for p in guide.parameters() if id(p) not in locs]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _initial_value(model: Any) -> Callable[[Any], Tensor]:
    values = model.initial_values() if hasattr(model, "initial_values") else {}

    def initial_value(site: Any) -> Tensor:
        name = site["name"]
        # Cloned, or training would overwrite the initial values in place.
        return values[name].detach().clone() if name in values else init_to_median(site)

    return initial_value


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _matrices(loc: Sites) -> tuple[str, ...]:
    return tuple(name for name, value in loc.items() if value.ndim > 1)


def _latent_shapes(guide: AutoContinuous) -> dict[str, Size]:
    return {name: site["value"].shape for name, site in _prototype(guide).iter_stochastic_nodes()}


def _split(guide: AutoContinuous, flat: Tensor) -> dict[str, Tensor]:
    shapes = _latent_shapes(guide)
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _loc_parameters(guide: AutoGuide) -> list[Tensor]:
    if isinstance(guide, _Sites) or (isinstance(guide, AutoContinuous) and hasattr(guide, "loc")):
        return [guide.loc]
    if isinstance(guide, AutoNormal):
        return list(guide.locs.parameters())
    if isinstance(guide, AutoDelta):
        return list(guide.parameters())
    raise UserError(
        f"a {type(guide).__name__} guide has no loc and scale to read; use mean_field, deterministic, AutoNormal, "
        "AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal or AutoMultivariateNormal"
    )


def _raw_locs(guide: AutoGuide) -> dict[str, Tensor]:
    """Writable views of every site's loc."""
    if isinstance(guide, _Sites):
        return dict(guide.unpack(guide.loc.data))
    _loc_parameters(guide)  # raises for a guide that has none
    if isinstance(guide, AutoContinuous):
        return _split(guide, guide.loc.data)
    home = guide.locs if isinstance(guide, AutoNormal) else guide
    names = [name for name, _ in _prototype(guide).iter_stochastic_nodes()]
    return {name: attrgetter(f"{name}_unconstrained")(home).data for name in names}


def _prototype(guide: AutoGuide) -> Any:
    if guide.prototype_trace is None:
        raise UserError(
            f"this {type(guide).__name__} has not met its model yet; build it with pyro_lottery.guides.auto"
        )
    return guide.prototype_trace


def _scales(guide: AutoGuide) -> dict[str, Tensor]:
    if isinstance(guide, MeanField):
        return dict(guide.unpack(guide.log_scale.exp()))
    if isinstance(guide, AutoContinuous):
        joint = guide.unmasked() if isinstance(guide, _Joint) else guide.get_posterior()
        return _split(guide, joint.variance.sqrt())
    assert isinstance(guide, AutoNormal)
    return {name: attrgetter(name)(guide.scales) for name in _raw_locs(guide)}


def _set_scales(guide: MeanField | AutoNormal, scales: Sites) -> None:
    if isinstance(guide, MeanField):
        flat = torch.cat([scales[name].reshape(-1) for name in guide.shapes]).to(guide.log_scale)
        guide.log_scale.copy_(_preimage(_EXP, flat))
        return
    transform = transform_to(guide.scale_constraint)
    for name in _raw_locs(guide):
        parameter = attrgetter(f"{name}_unconstrained")(guide.scales)
        parameter.data.copy_(_preimage(transform, scales[name].to(parameter)))


def _preimage(transform: Any, scale: Tensor) -> Tensor:
    """The parameter whose transform is ``scale`` to the last bit, if there is one within 8 units in the last place.

    exp(log(s)) is not s in floating point. Saved scales came out of exp, so a preimage exists close to log(s); with
    it a ticket is restored bit for bit from the scale alone.
    """
    scale = torch.where(scale > 0, scale, 1.0)
    best = transform.inv(scale)
    wrong = transform(best) != scale
    up = down = best
    for _ in range(8):
        if not wrong.any():
            break
        up = torch.nextafter(up, up.new_tensor(torch.inf))
        down = torch.nextafter(down, down.new_tensor(-torch.inf))
        for candidate in (up, down):
            hit = wrong & (transform(candidate) == scale)
            best = torch.where(hit, candidate, best)
            wrong = wrong & ~hit
    return best
