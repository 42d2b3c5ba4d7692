"""What a measurement of training steps works on: a copy of the network, and a batch of the run's own shape."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_lottery import seeds, trees
from pyro_lottery.data import Data, Stream
from pyro_lottery.distributed import Ranks
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.machine import channels_last_
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.priors import SitePrior
from pyro_lottery.threads import TURN


@contextmanager
def apart() -> Iterator[None]:
    """This thread's turn, after which the global generators of torch, numpy and Python are as before; torch's follow a seed."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with TURN, seeds.rng("cpu", 0, "trial"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def like_a_batch(head: Any, data: Data, batch_size: int, ranks: Ranks) -> Any:
    """A rank's share of a batch: the examples of ``head``, those of ``data.train.head()``, again and again, since only the
    shape counts.
    """
    if isinstance(data.train, Stream):  # its loader makes the batches
        given = getattr(data.train.loader, "batch_size", None)
        batch_size = given or math.ceil(len(data.train) / data.train.steps)
    count = min(batch_size, len(data.train))
    count = math.ceil(count / ranks.world) if ranks.parallel == "data" else count
    return trees.map_tensors(lambda t: t[torch.arange(count, device=t.device) % len(t)], head)


def copied_for(option: str, otherwise: str, model: BayesianNetwork) -> BayesianNetwork:
    """A copy of ``model`` to train; raises ``UserError``, which names ``option`` and what to give ``otherwise``."""
    try:
        copied = copy.deepcopy(model).train()
    except (TypeError, RuntimeError, AttributeError, copy.Error) as error:
        raise UserError(
            f"{option} measures a copy of the network, but copy.deepcopy cannot copy it ({one_line(error)}); give {otherwise}"
        ) from error
    channels_last_(copied)
    return copied


def description(model: BayesianNetwork) -> str:
    """The network's type, and a checksum of its modules, their options and the shapes of its weights.

    The text of a module is not used, since it reads weights, which would be sampled.
    """
    modules = [
        (
            name,
            type(module).__name__,
            sorted((key, repr(value)) for key, value in vars(module).items() if _is_option(key, value)),
        )
        for name, module in model.net.named_modules()
        if not isinstance(module, SitePrior)
    ]
    shapes = [(site, tuple(value.shape)) for site, value in model.initial_values().items()]
    return f"{type(model.net).__name__} {hashlib.sha256(repr((modules, shapes)).encode()).hexdigest()[:16]}"


def _is_option(key: str, value: Any) -> bool:
    """Whether an attribute of a module is a plain value such as a stride, whose text is the same in every process."""
    if key.startswith("_") or key == "training":
        return False
    return all(v is None or isinstance(v, int | float | str) for v in (value if isinstance(value, tuple) else (value,)))
