"""NUTS on a level of a run."""

from __future__ import annotations

from typing import Any

from pyro_lottery.data import Stream, in_memory
from pyro_lottery.errors import UserError
from pyro_lottery.posteriors import nuts as sampling
from pyro_lottery.runs.loaded import Level


def nuts(level: Level, x: Any = None, *, data_dir: str | None = None, **options: Any) -> sampling.Chains:
    """Sample the posterior of the surviving weights of ``level`` by NUTS, and predict ``x`` (default: the run's test inputs) with each draw.

    ``options`` are those of :func:`pyro_lottery.posteriors.nuts.nuts`: ``draws``, ``warmup``, ``chains``, ``seed``. BatchNorm and whatever else is not random stays as the level
    was trained to. ``x`` holds normalised inputs [n, ...], or is a split. Raises ``UserError`` for a level without scales, for a loader, and as that function.
    """
    if level.posterior.scale is None:
        raise UserError(
            f"nuts starts at draws of the posterior, and {level.run.folder.path} has a {level.run.config.guide} guide, whose weights have no scales"
        )
    data = level.run.load_data("cpu", data_dir)
    if x is None:
        if data.test is None:
            raise UserError("the run has no test data; give x")
        x = in_memory(data.test)[:]
    x = in_memory(x) if isinstance(x, Stream) else x
    network = level.load_model()
    return sampling.nuts(network.model, level.posterior, level.mask, in_memory(data.train), x, **options)
