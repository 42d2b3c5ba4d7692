"""The one place that knows where a guide keeps loc and scale: reading, restoring, pruning and grouping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.transforms import ExpTransform
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuide, AutoGuideList, AutoNormal
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_lottery import seeds
from pyro_lottery.errors import UserError
from pyro_lottery.guides import stock
from pyro_lottery.guides.check import check_guide
from pyro_lottery.guides.families import FlatGuide, MeanField, Point
from pyro_lottery.guides.places import Place, model_of
from pyro_lottery.handlers import active_mask
from pyro_lottery.kernels.layout import flatten
from pyro_lottery.names import check_same
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Posterior, Sites

_EXP = ExpTransform()


def is_point(guide: AutoGuide) -> bool:
    """Whether every draw of ``guide`` is the same, so that one sample is enough."""
    if isinstance(guide, AutoGuideList):
        return all(map(is_point, stock.parts_of(guide)))
    return isinstance(guide, Point) or stock.is_point(guide)


DRAWS = 200
"""Draws from which loc and scale of a guide without closed-form marginals are estimated."""


def has_marginals(guide: AutoGuide) -> bool:
    """Whether loc and scale of every site can be read from ``guide``; otherwise they are estimated from draws."""
    if isinstance(guide, AutoGuideList):
        return all(map(has_marginals, stock.parts_of(guide)))
    return isinstance(guide, FlatGuide) or stock.has_marginals(guide)


@torch.no_grad()
def locs(guide: AutoGuide) -> Sites:
    """Copies of the loc of every site."""
    check_guide(guide)
    if not has_marginals(guide):
        return posterior(guide).loc
    return {name: value.detach().clone() for name, value in raw_locs(guide).items()}


@torch.no_grad()
def posterior(guide: AutoGuide, draws: int = DRAWS) -> Posterior:
    """Copies of the marginal loc and scale of every site; scale is None for a point guide.

    Those of a site that is not over all real numbers are of its image under ``biject_to(support)``, where guides are Normal.
    For guides over one joint Gaussian these are its mean and standard deviation. A guide without closed-form marginals
    (a normalising flow, say) is drawn from ``draws`` times, always the same draws: loc then has the standard error
    scale/√draws and scale about scale/√(2·draws), and the posterior's ``draws`` says so. ``extra`` keeps the raw
    parameters of every guide that loc and scale do not determine.
    """
    check_guide(guide)
    if has_marginals(guide):
        loc = locs(guide)
        scale = None if is_point(guide) else {name: value.detach().clone() for name, value in raw_scales(guide).items()}
        draws = 0
    else:
        loc, scale = _moments(guide, draws)
        if is_point(guide):
            scale, draws = None, 0
    determined = has_marginals(guide) and not isinstance(guide, AutoContinuous | AutoGuideList)
    extra = {} if determined else {n: t.detach().clone() for n, t in guide.state_dict().items()}
    prunable = tuple(getattr(model_of(guide), "prunable", _matrices(guide, loc)))
    return Posterior(loc, scale, prunable, extra, draws)


def _moments(guide: AutoGuide, draws: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and standard deviation of draws, by Welford's recurrence, so that memory does not grow with their number."""
    if draws < 2:
        raise UserError(f"draws must be at least 2 for a standard deviation, got {draws}")
    places = _places(guide)
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    with TURN, seeds.stream(stock.device_of(guide), 0, "posterior"), poutine.block():
        for count in range(1, draws + 1):
            for name, drawn in guide().items():
                value = places[name].real_of(drawn)
                before = mean.get(name, torch.zeros_like(value))
                mean[name] = before + (value - before) / count
                square[name] = square.get(name, 0.0) + (value - before) * (value - mean[name])
    order = _ordered(guide, mean)
    return {n: mean[n] for n in order}, {n: (square[n] / (draws - 1)).sqrt() for n in order}


def _ordered(guide: AutoGuide, names: Iterable[str]) -> list[str]:
    """Names in the network's order, in which ties are settled, and after them those of hyperpriors."""
    names = list(names)
    return [*(n for n in getattr(model_of(guide), "sites", ()) if n in names)] + [
        n for n in names if n not in getattr(model_of(guide), "sites", ())
    ]


def not_finite(guide: AutoGuide) -> list[str]:
    """The sites whose loc or scale is not finite; of a guide that does not tell sites apart, its parameters."""
    tensors = list(raw_locs(guide).items()) if has_marginals(guide) else []
    if isinstance(guide, MeanField):
        tensors += guide.unpack(guide.log_scale.data).items()
    every = [*tensors, *((n.split("_unconstrained")[0], p.data) for n, p in guide.named_parameters())]
    bad = dict.fromkeys(name for name, value in tensors if not bool(value.isfinite().all()))
    return list(bad or dict.fromkeys(name for name, value in every if not bool(value.isfinite().all())))


@torch.no_grad()
def set_posterior_(guide: AutoGuide, posterior: Posterior) -> None:
    """Put loc and scale back into ``guide`` so that reading them again gives the same bits.

    A scale of 0 (a pruned weight) becomes 1, which no mask lets through. Missing, unknown or mis-shaped sites raise.
    """
    if isinstance(guide, FlatGuide) and guide.layout.index is not None:
        raise UserError("a guide that keeps only surviving weights while it trains cannot be set; do so before")
    raw = raw_locs(guide) if has_marginals(guide) else posterior.loc
    if posterior.scale is None and isinstance(guide, MeanField | AutoNormal):  # before anything is changed
        raise UserError(f"a {type(guide).__name__} needs scales, and this posterior has none")
    for what, sites in (("loc", posterior.loc), ("scale", posterior.scale)):
        if sites is None:
            continue
        check_same({f"{what}/{n}": t for n, t in sites.items()}, {f"{what}/{n}": t for n, t in raw.items()})
    if isinstance(guide, AutoContinuous | AutoGuideList) or not has_marginals(guide):
        if not posterior.extra:
            raise UserError(f"loc and scale do not determine a {type(guide).__name__}; its raw parameters are missing")
        guide.load_state_dict(dict(posterior.extra))
        return
    for name, value in raw.items():
        value.copy_(posterior.loc[name])
    if isinstance(guide, MeanField | AutoNormal) and posterior.scale is not None:
        set_scales(guide, posterior.scale)


@torch.no_grad()
def zero_pruned_(guide: AutoGuide, mask: Mask) -> None:
    """Set the loc of every pruned weight to exactly 0; its gradient and its weight decay are 0 from then on."""
    for name, value in raw_locs(guide).items():
        if name in mask:
            value.mul_(mask[name].to(value.device))


def active_masks(guide: AutoGuide) -> dict[str, Tensor]:
    """What the enclosing ``sparsify`` has for sites of ``guide``; nothing for a guide without a loc per weight."""
    values = raw_locs(guide) if has_marginals(guide) else {}
    masks = {name: active_mask(name, value.shape, value.device) for name, value in values.items()}
    return {name: mask for name, mask in masks.items() if mask is not None}


@contextmanager
def compressed(guide: AutoGuide) -> Iterator[None]:
    """Within this context a pruned weight costs ``guide`` nothing, under the ``sparsify`` that encloses it.

    A mean-field or point guide keeps only the surviving weights as its parameters, so build the optimizer inside; what
    was trained goes back to the full parameters at the end. Of any guide the loc of a pruned weight becomes 0.
    """
    if not has_marginals(guide):
        yield
        return
    zero_pruned_(guide, active_masks(guide))
    if not isinstance(guide, FlatGuide):
        yield
        return
    dense = guide.compress_()
    try:
        yield
    finally:
        guide.expand_(dense)


def parameter_groups(model: nn.Module, guide: AutoGuide, weight_decay: float) -> list[dict[str, Any]]:
    """Adam's parameter groups: locs and the network's own parameters decay, scales, learned priors and what is learned of
    the likelihood do not.

    Decay of a log-scale would pull every scale towards 1, which no prior of the paper asks for, and that of the noise
    towards 1 in the targets' unit.
    """
    locs = {id(value) for value in _loc_parameters(guide)}
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


def _matrices(guide: AutoGuide, loc: Sites) -> tuple[str, ...]:
    places = _places(guide)
    return tuple(name for name, value in loc.items() if value.ndim > 1 and not places[name].unprunable)


def _loc_parameters(guide: AutoGuide) -> list[Tensor]:
    if isinstance(guide, AutoGuideList):
        return [value for part in stock.parts_of(guide) for value in _loc_parameters(part)]
    if isinstance(guide, FlatGuide) or (isinstance(guide, AutoContinuous) and hasattr(guide, "loc")):
        return [guide.loc]
    if isinstance(guide, AutoNormal):
        return list(guide.locs.parameters())
    if isinstance(guide, AutoDelta):
        return list(guide.parameters())
    return []  # of a guide without closed-form marginals, no parameter is known to be a loc


def raw_locs(guide: AutoGuide) -> dict[str, Tensor]:
    """Views of every site's loc in a guide that :func:`has_marginals`; writable ones, unless it is compressed."""
    if isinstance(guide, FlatGuide):
        return guide.unpack(guide.loc.data)
    if not has_marginals(guide):
        raise UserError(f"a {type(guide).__name__} has no loc per weight; read it with guides.posterior, from draws")
    return _merged(guide, raw_locs) if isinstance(guide, AutoGuideList) else stock.locs_of(guide)


def raw_scales(guide: AutoGuide) -> dict[str, Tensor]:
    """Every site's scale in a guide that :func:`has_marginals` and is no point."""
    if isinstance(guide, MeanField):
        return guide.unpack(guide.bounded(guide.log_scale).exp())
    if is_point(guide):
        raise UserError(
            f"a {type(guide).__name__}, a part of this guide, is a point and has no scale; read the other parts with "
            "guides.posterior"
        )
    return _merged(guide, raw_scales) if isinstance(guide, AutoGuideList) else stock.scales_of(guide)


def _merged(guide: AutoGuideList, read: Callable[[AutoGuide], dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {name: value for part in stock.parts_of(guide) for name, value in read(part).items()}
    return {name: found[name] for name in _ordered(guide, found)}


def _places(guide: AutoGuide) -> Mapping[str, Place]:
    return {name: place for part in stock.parts_of(guide) for name, place in stock.places_of(part).items()}


@torch.no_grad()
def values_at_loc(guide: AutoGuide) -> dict[str, Tensor]:
    """The value of every site at its loc: loc itself for all sites over the real line."""
    check_guide(guide)
    if isinstance(guide, FlatGuide) or not has_marginals(guide):
        places = _places(guide)
        return {name: places[name].value_of(loc) for name, loc in locs(guide).items()}
    return _merged(guide, values_at_loc) if isinstance(guide, AutoGuideList) else stock.values_of(guide)


def set_scales(guide: MeanField | AutoNormal, scales: Sites) -> None:
    """Put scales into a guide whose sites are independent, in its own parametrisation; no check of names or shapes."""
    if isinstance(guide, MeanField):
        guide.check_scales(scales)
        flat = torch.cat([flatten(scales[name]) for name in guide.shapes]).to(guide.log_scale)
        guide.log_scale.copy_(_preimage(_EXP, flat))
        return
    transform = transform_to(guide.scale_constraint)
    for name in raw_locs(guide):
        parameter = attrgetter(f"{name}_unconstrained")(guide.scales)
        parameter.data.copy_(_preimage(transform, scales[name].to(parameter)))


def _preimage(transform: Any, scale: Tensor) -> Tensor:
    """The parameter whose transform is ``scale`` to the last bit, if there is one close to the inverse.

    exp(log(s)) is not s in floating point. Saved scales came out of exp, so a preimage exists close to log(s); with
    it a ticket is restored bit for bit from the scale alone. Looked at are the inverse's neighbours, and the inverses
    of numbers between the scale's neighbours, since near 0 parameters lie more densely than their scales.
    """
    scale = torch.where(scale == 0, 1.0, scale)
    best = transform.inv(scale)
    wrong = transform(best) != scale
    inverse, above = best, transform.inv(torch.nextafter(scale, scale.new_tensor(torch.inf)))
    up = down = best
    for step in range(1, 65):
        if not wrong.any():
            break
        up = torch.nextafter(up, up.new_tensor(torch.inf))
        down = torch.nextafter(down, down.new_tensor(-torch.inf))
        between = step / 32 * (above - inverse)
        for candidate in (up, down, inverse + between, inverse - between):
            hit = wrong & (transform(candidate) == scale)
            best = torch.where(hit, candidate, best)
            wrong = wrong & ~hit
    return best
