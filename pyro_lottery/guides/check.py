"""Whether a guide and a model belong together, before any time is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.poutine.util import site_is_subsample
from torch import Size

from pyro_lottery import seeds
from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import device_of
from pyro_lottery.guides.family import family
from pyro_lottery.guides.places import traced_sites
from pyro_lottery.names import check_same
from pyro_lottery.threads import TURN


def check_sites(model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> None:
    """Raise one ``UserError`` that names what differs if ``guide`` draws other sites than ``model`` has, or other shapes.

    Both are run once on ``args`` (a network's model and its guide need none), and random generators are left as they were.
    A guide of this package needs no run with the very model that it was built for.
    """
    drawn = family(guide).drawn_shapes()
    if drawn is not None and guide.model is model:
        return
    wanted = {name: site["value"].shape for name, site in traced_sites(model, *args, **kwargs)}
    given = _drawn_shapes(guide, *args, **kwargs) if drawn is None else drawn
    check_same(given, wanted, "the guide is of another model: ", "model")


def check_guide(guide: Any) -> None:
    """Raise ``UserError`` unless ``guide`` is an AutoGuide, whose parameters are complete before the first batch."""
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


def _drawn_shapes(guide: Any, *args: Any, **kwargs: Any) -> dict[str, Size]:
    """The shapes of the values that a guide draws for sites of its model."""
    with TURN, seeds.rng(device_of(guide), 0, "check"), torch.no_grad(), poutine.block():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {
        name: site["value"].shape
        for name, site in trace.iter_stochastic_nodes()
        if not (site_is_subsample(site) or site["infer"].get("is_auxiliary"))
    }
