"""``--sparse auto``: whether whole training steps are faster with sparse layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch.optim import Adam

from pyro_lottery import guides, masks, trees
from pyro_lottery.data import Data
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.elbo import ELBO
from pyro_lottery.faster import Work, fastest
from pyro_lottery.handlers import sparse_layers, sparsify
from pyro_lottery.handlers.sparse_layers import CHOICES, measured_code
from pyro_lottery.kernels import native
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.training.schedule import steps_in
from pyro_lottery.training.step import step
from pyro_lottery.training.trial import apart, copied_for, description, like_a_batch
from pyro_lottery.types import Mask

STEPS = 200
"""Steps of a level below which whole steps are not measured, since that takes as long as a dozen steps."""


def sparse_for_data(
    choice: str, mask: Mask, model: BayesianNetwork, guide: AutoGuide, data: Data, *, epochs: int, batch_size: int,
    precision: str, estimator: str = "weights", ranks: Ranks = ALONE,
) -> str:  # fmt: skip
    """Return ``on`` or ``off`` in place of ``auto`` if whole training steps are faster so, and ``choice`` otherwise.

    ``auto`` of :func:`pyro_lottery.handlers.sparse_layers` chooses layer by layer, and does not see what lies between layers.
    So a few steps of a copy of ``model`` are timed under ``mask`` with each choice, once per processor, number of threads,
    network, batch and densities of its layers (:func:`pyro_lottery.faster.fastest`). ``auto`` stays if nothing is pruned, if
    no layer alone is faster sparse, on a GPU, without a C compiler, for trainings so short that measuring would not pay, and
    for networks of which no copy can be trained. All ``ranks`` return what the first finds.
    """
    is_long = epochs * steps_in(data.train, batch_size, ranks.least) >= STEPS
    device = next(iter(guide.parameters())).device
    if choice != "auto" or masks.is_full(mask) or not is_long or device.type != "cpu":
        return choice
    x, y = (like_a_batch(each, data, batch_size, ranks) for each in data.train.head())
    is_point = guides.is_point(guide)
    noise = "weights" if is_point else estimator
    kept = ", ".join(f"{name} {density:.1g}" for name, density in masks.density_per_site(mask).items())
    what = (
        f"sparse layers in a training step of {description(model)} on {trees.shapes(x)}, {precision}, "
        f"{'no noise' if is_point else noise}, kept of {kept}, torch {torch.__version__}, code {measured_code()}"
    )

    @functools.cache
    def ready() -> Callable[[str], dict[str, str]]:
        """A function that takes a step with a choice, and returns how its layers are computed."""
        copied = copied_for("--sparse auto", "--sparse on or off", model)
        pruning, own = sparsify(mask), (guides.deterministic if is_point else guides.mean_field)(copied)
        with pruning:
            own.compress_()
        optimizer = Adam(guides.parameter_groups(copied, own, 0.0), 1e-4, fused=True)
        elbo, layers = ELBO(estimator=noise), {name: sparse_layers(name) for name in CHOICES}

        def one(name: str) -> dict[str, str]:
            with pyro.validation_enabled(False), pruning, layers[name]:
                step(copied, own, elbo, optimizer, x, y, precision=precision)
            return layers[name].ways

        return one

    def steps(name: str) -> Work:
        return lambda: functools.partial(ready(), name)

    def measured() -> str:
        with apart():
            try:
                if "sparse" not in ready()("auto").values():
                    return choice
                return fastest({name: steps(name) for name in CHOICES}, what)
            except Exception:  # a trial must not stop a run; if the network cannot be trained, training says why
                return choice

    found = ranks.first(measured)
    return choice if native.problem() is not None else found
