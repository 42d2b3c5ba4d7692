"""Guides from a model, by function or by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoCallable,
    AutoContinuous,
    AutoDelta,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuide,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMessenger,
    AutoNormal,
    AutoStructured,
)

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.guides.adapted import Adapted, adapted
from pyro_lottery.guides.adapted_laplace import AdaptedLaplace
from pyro_lottery.guides.dropout import mc_dropout
from pyro_lottery.guides.family import family
from pyro_lottery.guides.found import laplace, swag
from pyro_lottery.guides.ivon import ivon
from pyro_lottery.guides.joint import AdaptedJoint
from pyro_lottery.guides.langevin import sghmc, sgld
from pyro_lottery.guides.lists import AdaptedList
from pyro_lottery.guides.mean_field import mean_field
from pyro_lottery.guides.memory import check_memory
from pyro_lottery.guides.places import Place, continuous_sites, initial_value, whole
from pyro_lottery.guides.point import deterministic
from pyro_lottery.handlers import left_out
from pyro_lottery.threads import TURN
from pyro_lottery.types import Posterior
from pyro_lottery.untrusted import load_callable


def auto(
    kind: type[AutoGuide], model: Callable[..., Any], init_scale: float = 0.01, *prototype_args: Any, **options: Any
) -> AutoGuide:
    """One of Pyro's AutoGuides that obeys masks and the KL temperature, with its parameters complete before the first batch.

    It starts like :func:`mean_field` as far as it can: AutoNormal's scales start per layer, other guides take
    ``init_scale`` times the median Kaiming scale everywhere. ``prototype_args`` are arguments to trace a model that cannot
    run without data, and ``options`` the guide's own (``rank``, ``hidden_dim``). Raises ``UserError`` for a class that
    cannot be adapted, for plates that it does not follow, and for a covariance that is larger than the machine's memory.
    """
    _check_kind(kind)
    sites = continuous_sites(model, *prototype_args)
    _check_plates(kind, sites)
    _check_names(kind, sites)
    if options.get("conditionals", "mvn") == "mvn":  # AutoStructured's others are small
        check_memory(kind, [site["value"].numel() for site in sites.values()], _device(sites))
    kaiming = getattr(model, "kaiming_scale", {})
    usual = init_scale * (float(torch.tensor(list(kaiming.values())).median()) if kaiming else 1.0)
    ours: dict[str, Any] = {"init_loc_fn": initial_value(model), "init_scale": usual}
    taken = set(inspect.signature(kind).parameters)
    for name in options:
        if name not in taken - {"model"}:
            raise unknown(f"option of {kind.__name__}", name, sorted(taken - {"model"}))
    if issubclass(kind, AutoIAFNormal):
        taken.discard("init_loc_fn")  # since it warns that it ignores this
    by = next(by for known, by in _ADAPTED.items() if issubclass(kind, known))
    guide = adapted(kind, by)(model, **{name: value for name, value in ours.items() if name in taken} | options)
    with TURN, torch.no_grad(), poutine.block(), left_out():
        # Before the guide's first call, during which the model's own parameters would stay out of Pyro's store.
        guide._setup_prototype(*prototype_args)
        guide.places = {name: Place.of(site) for name, site in sites.items()}
        guide(*prototype_args)
    device = next(iter(model.initial_values().values())).device if hasattr(model, "initial_values") else None
    own = family(guide)
    if own.takes_scales:
        locs = own.locs()
        scales = {name: torch.full_like(loc, init_scale * kaiming.get(name, 1.0)) for name, loc in locs.items()}
        own.set_(Posterior(locs, scales, prunable=()))
    return guide.to(device) if device is not None else guide


def _device(sites: Mapping[str, Any]) -> torch.device:
    return next(iter(sites.values()))["value"].device


_ADAPTED: dict[type[AutoGuide], type[AutoGuide]] = {
    AutoLaplaceApproximation: AdaptedLaplace,
    AutoContinuous: AdaptedJoint,
    AutoGuideList: AdaptedList,
    AutoGuide: Adapted,
}
"""What a class of Pyro's is adapted with: the entry of the first class that it is a subclass of."""

_REFUSED: dict[type, str] = {
    AutoMessenger: "is a messenger guide, whose parameters are not known before the first batch and which runs the network "
    "twice a draw; use mean_field or AutoNormal",
    AutoGaussian: "is one class of several; use AutoMultivariateNormal, which is as general",
    AutoCallable: "wraps a guide of your own; give that to pyro.infer.SVI with pl.ELBO, or to pl.predict",
    AutoDiscreteParallel: "is for discrete sites; use mean_field or AutoNormal",
}


def _check_kind(kind: Any) -> None:
    """Raise ``UserError`` unless ``kind`` is a class of Pyro's AutoGuides that can have masks, a temperature and a posterior."""
    if not (isinstance(kind, type) and issubclass(kind, AutoGuide | AutoMessenger)):
        raise UserError(f"guides.auto takes a class of pyro.infer.autoguide such as AutoNormal, got {kind!r}")
    for refused, why in _REFUSED.items():
        if issubclass(kind, refused):
            raise UserError(f"{kind.__name__} {why}")
    if kind in (AutoGuide, AutoContinuous):
        raise UserError(f"{kind.__name__} is what other guides are made from; use one of them, such as AutoNormal")


def _check_names(kind: type[AutoGuide], sites: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for names that Pyro would read as attributes of another site's parameter."""
    if not issubclass(kind, AutoNormal | AutoDelta | AutoStructured):
        return
    for name in sites:
        if above := next((other for other in sites if name.startswith(f"{other}.")), None):
            raise UserError(
                f"site {name!r} lies below site {above!r}, which {kind.__name__} cannot hold; name it {name.replace('.', '_')!r}, "
                "or use mean_field"
            )


def _check_plates(kind: type[AutoGuide], sites: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for plates that a guide of Pyro's would silently treat wrongly."""
    for name, site in sites.items():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise UserError(
                    f"site {name!r} is in the loop {frame.name!r}, which Pyro's guides refuse; use mean_field"
                )
            if whole(frame) != frame.size and not issubclass(kind, AutoNormal | AutoDelta | AutoGuideList):
                raise UserError(
                    f"site {name!r} is in a subsample of {frame.name!r}, and {kind.__name__} has no loc for the rest of "
                    "it; use mean_field or AutoNormal"
                )


NAMED: dict[str, Callable[..., AutoGuide]] = {
    "mean_field": mean_field, "deterministic": deterministic, "laplace": laplace, "swag": swag, "sgld": sgld, "sghmc": sghmc,
    "ivon": ivon, "mc_dropout": mc_dropout,
}  # fmt: skip
"""Guides by their names on the command line."""


def check_name(name: str) -> Any:
    """The function or class that a guide's command-line name or import path names; ``UserError`` if there is none."""
    if name in NAMED:
        return NAMED[name]
    if "." not in name and ":" not in name:
        raise unknown("--guide", name, [*NAMED, "package.module.AutoGuide"])
    return load_callable(name, "--guide")


def by_name(name: str, model: Callable[..., Any], init_scale: float) -> AutoGuide:
    """A guide from its command-line name, or from the import path of a Pyro AutoGuide or of ``model -> guide``."""
    return made_by(check_name(name), model, init_scale, f"--guide {name}")


def made_by(kind: Any, model: Callable[..., Any], init_scale: float, said: str = "guide") -> AutoGuide:
    """A guide from ``mean_field``, a Pyro AutoGuide class, or a function ``model -> guide``.

    Raises ``UserError``, which calls it ``said``, if the result is not a Pyro AutoGuide.
    """
    if isinstance(kind, type) and issubclass(kind, AutoGuide):
        return auto(kind, model, init_scale)
    takes_scale = kind in NAMED.values() and kind not in (deterministic, mc_dropout)
    guide = kind(model, init_scale) if takes_scale else kind(model)
    if not isinstance(guide, AutoGuide):
        raise UserError(f"{said} gave a {type(guide).__name__}; expected a Pyro AutoGuide, or model -> AutoGuide")
    return guide
