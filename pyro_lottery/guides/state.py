"""Reading a guide, setting it, pruning it, and grouping its parameters for an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import model_of
from pyro_lottery.guides.check import check_guide
from pyro_lottery.guides.family import family
from pyro_lottery.guides.moments import moments
from pyro_lottery.handlers import active_mask
from pyro_lottery.names import check_same
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Posterior, Sites

DRAWS = 200
"""Draws from which loc and scale of a guide without closed-form marginals are estimated."""


def is_point(guide: Any) -> bool:
    """Whether every draw of ``guide`` is the same, so that one sample is enough."""
    return family(guide).is_point


@torch.no_grad()
def locs(guide: AutoGuide) -> Sites:
    """Copies of the loc of every site."""
    check_guide(guide)
    own = family(guide)
    return _copies(own.locs()) if own.has_marginals else posterior(guide).loc


@torch.no_grad()
def values_at_loc(guide: AutoGuide) -> dict[str, Tensor]:
    """Copies of every site's value at its loc, with the site's shape; for sites over the real line, the value is loc."""
    check_guide(guide)
    own = family(guide)
    if not own.has_marginals:
        places = own.sites()
        return {name: places[name].value_of(loc) for name, loc in locs(guide).items()}
    with TURN, poutine.block():
        return own.values()


@torch.no_grad()
def posterior(guide: AutoGuide, draws: int = DRAWS) -> Posterior:
    """Copies of the marginal loc and scale of every site; scale is None for a guide without scales.

    For a site that is not over all real numbers, these are the loc and scale of its image under ``biject_to(support)``,
    where guides are Normal. For a guide that is one joint Gaussian, they are its mean and standard deviation. A guide
    without closed-form marginals (a normalising flow, say) is drawn from ``draws`` times, always the same draws: loc then
    has the standard error scale/√draws and scale about scale/√(2·draws), and the posterior's ``draws`` is their number.
    ``extra`` keeps the raw parameters of every guide that loc and scale do not determine.
    """
    check_guide(guide)
    own = family(guide)
    loc: Sites
    scale: Sites | None
    if own.has_marginals:
        loc, scale, draws = _copies(own.locs()), _copies(own.scales()), 0
    else:
        loc, scale = moments(guide, own.sites(), draws)
    if not scale or (own.is_point and own.scales_are_trained):
        scale, draws = None, 0
    extra = {} if own.is_determined else _copies(guide.state_dict())
    return Posterior(loc, scale, _prunable(guide, loc), extra, draws)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _prunable(guide: AutoGuide, loc: Sites) -> tuple[str, ...]:
    """The network's prunable sites; for other models, all sites with at least two dimensions that can be masked."""
    model = model_of(guide)
    if hasattr(model, "prunable"):
        return tuple(model.prunable)
    places = family(guide).sites()
    return tuple(name for name, value in loc.items() if value.ndim > 1 and not places[name].unprunable)


@torch.no_grad()
def set_posterior_(guide: AutoGuide, posterior: Posterior) -> None:
    """Put loc and scale back into ``guide`` so that reading them again gives the same bits.

    A scale of 0 (a pruned weight) becomes 1, which no mask lets through. Raises ``UserError`` for sites that are missing,
    unknown or of another shape, before anything is changed.
    """
    own = family(guide)
    if own.has_marginals:
        wanted = {name: loc.shape for name, loc in own.locs().items()}
    else:
        wanted = {name: place.real_shape for name, place in own.sites().items()}
    if own.takes_scales and posterior.scale is None:
        raise UserError(
            f"guide {type(guide).__name__} needs scales, and this posterior has none; give one of a guide that is not a point"
        )
    for what, sites in (("loc", posterior.loc), ("scale", posterior.scale)):
        if sites is not None:
            check_same(sites, wanted, prefix=f"{what}/")
    own.set_(posterior)


@torch.no_grad()
def set_posterior_at_(guide: AutoGuide, where: Mask, posterior: Posterior) -> None:
    """:func:`set_posterior_`, of the weights alone where ``where``, a bool tensor by site of the site's shape, is True.

    Guides other than this package's take the whole of ``posterior``.
    """
    family(guide).set_at_(where, posterior)


def moved_moments(
    model: nn.Module, guide: AutoGuide, moments: Mapping[int, Mapping[str, Tensor]], before: Mask, after: Mask
) -> dict[int, dict[str, Tensor]]:
    """Adam's ``moments``, of a training under ``before`` within :func:`compressed`, for one that goes on under ``after``.

    They are those of an optimizer's state dict, over the parameters of :func:`parameter_groups`; those of a new weight are 0. Masks hold
    bool tensors of the sites' shapes.
    """
    parameters = [p for group in parameter_groups(model, guide, 0.0) for p in group["params"]]
    own = family(guide)
    return {
        index: {
            name: value if name == "step" else own.relaid(parameters[index], value, before, after)
            for name, value in of_one.items()
        }
        for index, of_one in moments.items()
    }


def not_finite(guide: AutoGuide) -> list[str]:
    """The sites whose parameters are not all finite; the parameters' names where they belong to no site."""
    sites = family(guide).per_site()
    parameters = [(name.split("_unconstrained")[0], p.data) for name, p in guide.named_parameters()]
    for tensors in (sites, parameters):
        bad = [name for name, value in tensors if not bool(value.isfinite().all())]
        if bad:
            return list(dict.fromkeys(bad))
    return []


@torch.no_grad()
def zero_pruned_(guide: AutoGuide, mask: Mask) -> None:
    """Set the loc of every pruned weight to exactly 0; its gradient and its weight decay are 0 from then on."""
    for name, loc in family(guide).locs().items():
        if name in mask:
            loc.mul_(mask[name].to(loc.device))


def active_masks(guide: AutoGuide) -> dict[str, Tensor]:
    """The masks of the enclosing ``sparsify`` for sites of ``guide``, with the sites' shapes; empty without a loc per weight."""
    own = family(guide)
    locs = own.locs() if own.has_marginals else {}
    masks = {name: active_mask(name, loc.shape, loc.device) for name, loc in locs.items()}
    return {name: mask for name, mask in masks.items() if mask is not None}


@contextmanager
def compressed(guide: AutoGuide) -> Iterator[None]:
    """Let only the weights that the enclosing ``sparsify`` keeps cost memory and time within this context.

    A mean-field or point guide has only the surviving weights as its parameters, so build the optimizer inside; what was
    trained goes back to the full parameters at the end. In every guide the loc of a pruned weight becomes 0.
    """
    own = family(guide)
    if own.has_marginals:
        zero_pruned_(guide, active_masks(guide))
    with own.compressed():
        yield


def decay_of_prior(guide: AutoGuide, weight_decay: float) -> float:
    """``weight_decay`` λ if loc and scale of ``guide`` are those under p(w) exp(−Nλw²/2T), otherwise 0: then it moves at most the loc."""
    return weight_decay if family(guide).decays_as_prior else 0.0


def scales_are_trained(guide: AutoGuide) -> bool:
    """Whether training finds the scales of ``guide``; otherwise :func:`pyro_lottery.posteriors.find_scales_` does afterwards."""
    return family(guide).scales_are_trained


def training_point(guide: AutoGuide) -> AbstractContextManager[None]:
    """A context of a training, in which a guide whose scales are found afterwards is a point."""
    return family(guide).training_point()


def drawn_from(guide: AutoGuide) -> AbstractContextManager[None]:
    """A context for several draws from ``guide`` under one mask, in which no parameter may change.

    The parameters of surviving weights are looked up once instead of at every draw.
    """
    return family(guide).drawn_from()


def parameter_groups(model: nn.Module, guide: AutoGuide, weight_decay: float) -> list[dict[str, Any]]:
    """Adam's parameter groups: locs and the network's own parameters decay; scales and the learned parameters of priors
    and likelihoods do not.

    Weight decay would pull every scale towards 1, which no prior of the paper asks for, and a learned noise towards 1 in
    the targets' unit.
    """
    locs = {id(value) for value in family(guide).loc_parameters()}
    others: list[Any] = getattr(model, "prior_parameters", list)()
    others = [*others, *getattr(model, "likelihood_parameters", dict)().values()]
    learned = {id(p) for p in others}
    decayed = [p for p in guide.parameters() if id(p) in locs] + [p for p in model.parameters() if id(p) not in learned]
    rest = [p for p in guide.parameters() if id(p) not in locs] + others
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.requires_grad], "weight_decay": decay}  # what is frozen stays
        for parameters, decay in ((decayed, weight_decay), (rest, 0.0))
    ]
    return [group for group in groups if group["params"]]
