"""Whether a guide and a model belong together, before any time is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.poutine.util import site_is_subsample
from torch import Size, nn

from pyro_lottery import seeds
from pyro_lottery.errors import UserError
from pyro_lottery.guides.families import FlatGuide
from pyro_lottery.guides.places import random_sites
from pyro_lottery.names import check_same
from pyro_lottery.threads import TURN


def check_sites(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise one ``UserError`` that names what differs if ``guide`` draws other sites than ``model`` has, or other shapes.

    Both are run once on ``args`` for that (a network's model and its guide need none), and random generators are left
    as they were; a guide of this package with the very model that it was built for needs no run.
    """
    if isinstance(guide, FlatGuide) and guide.model is model:
        return
    wanted = {name: site["value"].shape for name, site in random_sites(model, *args, **kwargs)}
    check_same(_drawn(guide, *args, **kwargs), wanted, "the guide is of another model: ", "model")


def check_guide(guide: Any) -> None:
    """Raise ``UserError`` for what is no AutoGuide, whose parameters are complete before the first batch."""
    if not isinstance(guide, AutoGuide):
        raise UserError(
            f"expected a guide of pyro_lottery.guides or of Pyro's AutoGuides, got a {type(guide).__name__}, whose "
            "parameters are not known before it is called; use guides.mean_field, or guides.auto with AutoNormal"
        )
    if isinstance(guide, AutoGuideList) and not len(guide):
        raise UserError(
            "this AutoGuideList has no parts yet; append guides.mean_field or guides.auto of pyro.poutine.block(model, "
            "hide=[...]), one for each group of sites"
        )


def _drawn(guide: Any, *args: Any, **kwargs: Any) -> dict[str, Size]:
    """The shapes of the values that a guide draws for sites of its model."""
    if isinstance(guide, FlatGuide):
        return {name: place.shape for name, place in guide.places.items()}
    device = next(guide.parameters(), torch.empty(0)).device if isinstance(guide, nn.Module) else torch.device("cpu")
    with TURN, seeds.stream(device, 0, "check"), torch.no_grad(), poutine.block():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {
        name: site["value"].shape
        for name, site in trace.iter_stochastic_nodes()
        if not (site_is_subsample(site) or site["infer"].get("is_auxiliary"))
    }
