"""The variational families."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn

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
    """

    flat: ClassVar[tuple[str, ...]] = ("loc",)
    """Names of the flat parameters."""

    def __init__(self, model: Callable[..., Any], *prototype_args: Any):
        super().__init__(model)
        values = {}
        for name, site in real_sites(model, *prototype_args):
            if any(frame.vectorized for frame in site["cond_indep_stack"]):
                raise UserError(f"site {name!r} is inside a plate; use guides.auto with Pyro's AutoNormal")
            value = site["value"]
            assert value is not None  # it has just been drawn
            values[name] = value
        self.shapes: dict[str, Size] = {name: value.shape for name, value in values.items()}
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

    def __init__(self, model: Callable[..., Any], init_scale: float, *prototype_args: Any):
        super().__init__(model, *prototype_args)
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
        with poutine.scale(scale=self._temperature):
            return {
                name: pyro.sample(name, SiteNormal(draw, number).to_event(len(shape)))
                for number, (name, shape) in enumerate(self.shapes.items())
            }


class Point(FlatGuide):
    """A Delta at loc for every site: maximum likelihood under ``priors.flat``, MAP under any other prior."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        layout, (loc,) = self.under_masks()
        values = zip(self.shapes, layout.views(layout.scatter(loc)), strict=True)
        with poutine.scale(scale=self._temperature):
            return {name: pyro.sample(name, PointMass(value, event_dim=value.dim())) for name, value in values}


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
    """The trace that one of Pyro's guides took of its model; ``UserError`` if there is none yet, or of a site that is
    not over all real numbers.
    """
    if guide.prototype_trace is None:
        raise UserError(
            f"this {type(guide).__name__} has not met its model yet; build it with pyro_lottery.guides.auto"
        )
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
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
    return list(trace.iter_stochastic_nodes())


def real_sites(model: Callable[..., Any], *prototype_args: Any) -> list[tuple[str, Any]]:
    """The random sites of a model at their initial values; ``UserError`` for one that is not over all real numbers."""
    sites = random_sites(model, *prototype_args)
    for name, site in sites:
        _check_real(name, site["fn"])
    return sites


def _check_real(site: str, distribution: Any) -> None:
    support = distribution.support
    while hasattr(support, "base_constraint"):  # of an independent one, or of a mixture
        support = support.base_constraint
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
