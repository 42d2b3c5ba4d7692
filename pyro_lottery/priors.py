"""Priors on weights: a distribution per weight, a function ``(site, shape) -> distribution``, or a dict of these by glob."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor, nn

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.imports import load_callable

# Torch does not say how a mixture's support is reached from the real line, which Pyro's guides ask of every site: as
# that of its components is.
for _registry in (torch.distributions.biject_to, torch.distributions.transform_to):
    _registry.register(
        torch.distributions.constraints.MixtureSameFamilyConstraint,
        lambda constraint, registry=_registry: registry(constraint.base_constraint),
    )

Prior = Callable[[str, Size], dist.TorchDistribution]
AnyPrior = Prior | dist.TorchDistribution | Mapping[str, Prior | dist.TorchDistribution]


def of_sites(prior: AnyPrior, sites: Iterable[str]) -> Prior:
    """Any kind of prior as a function of site and shape.

    In a dict of globs over site names the first that matches a site counts: ``{"*.conv1.weight": laplace(0.1), "*":
    normal(1.0)}``. Raises ``UserError`` for a glob that matches no site, with near matches, and for a site without one.
    """
    if not isinstance(prior, Mapping):
        return _function(prior)
    sites, globs = list(sites), {glob: _function(value) for glob, value in prior.items()}
    for glob in globs:
        if not any(fnmatchcase(site, glob) for site in sites):
            near = difflib.get_close_matches(glob.replace("*", ""), sites, n=3, cutoff=0.3) or sites[:3]
            raise UserError(f"the prior's glob {glob!r} matches no site; near: {', '.join(near)}")
    chosen = {site: next((globs[glob] for glob in globs if fnmatchcase(site, glob)), None) for site in sites}
    for site, value in chosen.items():
        if value is None:
            raise UserError(f"no glob of the prior matches site {site!r}; add '*' for all others")
    for glob in globs:
        if globs[glob] not in chosen.values():
            site = next(site for site in sites if fnmatchcase(site, glob))
            before = next(other for other in globs if fnmatchcase(site, other))
            raise UserError(
                f"the prior's glob {glob!r} is never reached, since {before!r} comes first; put it before that"
            )
    return lambda site, shape: chosen[site](site, shape)  # type: ignore[misc]


def of_site(prior: Prior, site: str, shape: Size) -> dist.TorchDistribution:
    """What a prior says of one site; ``UserError`` that names the site if that is no distribution."""
    try:
        found = prior(site, shape)
    except UserError:
        raise
    except Exception as error:  # a user's function may fail in any way
        text = str(error).split("\n")[0]
        raise UserError(f"the prior of {site!r} failed ({type(error).__name__}: {text}); {_EXPECTED}") from error
    if not isinstance(found, TorchDistributionMixin):
        raise UserError(f"the prior of {site!r} gave {found!r}; {_EXPECTED}")
    return found  # type: ignore[return-value]


_EXPECTED = "a prior is a pyro.distributions object, or a function (site, shape) -> one, as priors.normal(1.0) gives"


def _function(prior: Any) -> Prior:
    if isinstance(prior, torch.distributions.Distribution):
        return lambda site, shape: prior  # type: ignore[return-value]
    if not callable(prior):
        raise UserError(f"{_EXPECTED}, or a dict of these by glob; got {prior!r}")
    return prior


def normal(*loc_scale: float, scale: float | None = None) -> Prior:
    """N(loc, scale²) on every weight (paper §3); one number is the scale, two are loc and scale."""
    loc, width = _loc_scale("normal", loc_scale, scale)
    return lambda site, shape: dist.Normal(torch.tensor(loc), torch.tensor(width))


def laplace(*loc_scale: float, scale: float | None = None) -> Prior:
    """Laplace(loc, scale) on every weight; one number is the scale, two are loc and scale."""
    loc, width = _loc_scale("laplace", loc_scale, scale)
    return lambda site, shape: dist.Laplace(torch.tensor(loc), torch.tensor(width))


def student_t(scale: float = 1.0, df: float = 3.0) -> Prior:
    """Student's t with ``df`` degrees of freedom, centred at zero, on every weight."""
    _loc_scale("student_t", (scale,))
    if not df > 0:
        raise UserError(f"student_t prior: df must be greater than 0, got {df}")
    return lambda site, shape: dist.StudentT(torch.tensor(df), torch.tensor(0.0), torch.tensor(scale))


def mixture(scale: float = 1.0, narrow: float = 0.0025, weight: float = 0.5) -> Prior:
    """π·N(0, scale²) + (1 − π)·N(0, narrow²) with π = ``weight``, the scale mixture of Bayes by Backprop (Blundell et al. 2015)."""
    for name, value in (("scale", scale), ("narrow", narrow)):
        _loc_scale(f"mixture ({name})", (value,))
    if not 0 < weight < 1:
        raise UserError(f"mixture prior: weight must be between 0 and 1, got {weight}")
    shares, scales = torch.tensor([weight, 1 - weight]), torch.tensor([scale, narrow])
    return lambda site, shape: dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(torch.zeros(2), scales))


def fan_in(scale: float = 1.0) -> Prior:
    """N(0, scale²/fan_in) on weights, by the layer's number of inputs, so that activations keep their size through a
    network; N(0, scale²) on what has one dimension, biases.
    """
    _loc_scale("fan_in", (scale,))

    def prior(site: str, shape: Size) -> dist.TorchDistribution:
        inputs = shape[1:].numel() if len(shape) > 1 else 1
        return dist.Normal(torch.tensor(0.0), torch.tensor(scale / inputs**0.5))

    return prior


def flat() -> Prior:
    """The improper uniform prior: log p(w) = 0, so that a point guide is maximum likelihood."""
    return lambda site, shape: Flat()


KINDS: dict[str, Callable[[float], Prior]] = {
    "normal": normal, "laplace": laplace, "student_t": student_t, "mixture": mixture, "fan_in": fan_in,
}  # fmt: skip
"""Priors by their command-line names, from one scale."""


def by_name(name: str, scale: float) -> Prior:
    """A prior from its command-line name, or from the import path of ``(site, shape) -> distribution``."""
    if name in KINDS:
        return KINDS[name](scale)
    if "." not in name:
        raise unknown("prior", name, [*KINDS, "package.module.function"])
    return load_callable(name, "--prior")


def _loc_scale(name: str, numbers: tuple[float, ...], named: float | None = None) -> tuple[float, float]:
    numbers = numbers if named is None else (*numbers, named)
    if len(numbers) > 2:
        raise UserError(f"{name} prior: expected (scale) or (loc, scale), got {len(numbers)} numbers")
    loc, scale = (0.0, *numbers) if len(numbers) == 1 else (numbers or (0.0, 1.0))
    if not scale > 0:
        raise UserError(f"{name} prior: scale must be greater than 0, got {scale}")
    return float(loc), float(scale)


class Flat(dist.TorchDistribution):
    """The improper density 1 on the real line; it cannot be sampled."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(self, batch_shape: Any = (), validate_args: bool | None = None):
        super().__init__(Size(batch_shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flat:
        return Flat(Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise UserError("a flat prior cannot be sampled; use priors.normal, or a guide to draw weights from")


class SitePrior(nn.Module):
    """One site's prior: any distribution per weight that broadcasts to the site's shape.

    The distribution's tensors, also those of distributions inside it, are this module's buffers, so that ``.to()``
    moves them and the state dict holds them; a PyroSample alone does neither.
    """

    def __init__(self, site: str, distribution: Any, shape: Size):
        super().__init__()
        while isinstance(distribution, dist.Independent):
            distribution = distribution.base_dist
        self.shape = shape
        self._owners: dict[str, tuple[Any, str]] = {}
        self.distribution = self._adopt(distribution, "")
        try:
            fits = self().event_shape == shape
        except Exception as error:
            raise UserError(f"the prior of {site!r} does not broadcast to {tuple(shape)} ({error})") from error
        if not fits:
            raise UserError(f"the prior of {site!r} must be a distribution per weight, not over vectors")

    def _adopt(self, original: Any, path: str) -> Any:
        """A copy of a distribution or transform whose tensors are buffers of this module."""
        owner = copy.copy(original)
        for name, value in list(vars(owner).items()):
            key = f"{path}_{name}" if path else name
            if isinstance(value, Tensor):
                self.register_buffer(key, value.detach().clone())
                self._owners[key] = (owner, name)
                setattr(owner, name, getattr(self, key))
            elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
                setattr(owner, name, self._adopt(value, key))
            elif isinstance(value, list) and all(isinstance(v, torch.distributions.Transform) for v in value):
                setattr(owner, name, [self._adopt(v, f"{key}_{place}") for place, v in enumerate(value)])
        return owner

    def _apply(self, *args: Any, **kwargs: Any) -> SitePrior:
        super()._apply(*args, **kwargs)
        for key, (owner, name) in self._owners.items():
            setattr(owner, name, getattr(self, key))
        return self

    def forward(self) -> dist.TorchDistribution:
        return self.distribution.expand(self.shape).to_event(len(self.shape))
