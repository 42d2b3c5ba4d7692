"""The flat prior, with which a point guide is maximum likelihood."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_lottery.errors import UserError
from pyro_lottery.priors.by_site import Prior


def flat() -> Prior:
    """The improper uniform prior, log p(w) = 0, with which a point guide is maximum likelihood."""
    return lambda site, shape: Flat()


class Flat(dist.TorchDistribution):
    """The improper density 1 on the real line, which cannot be sampled."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(self, batch_shape: Any = ()):
        super().__init__(Size(batch_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flat:
        return Flat(batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """0, with the shape of ``value``."""
        return value.new_zeros(value.shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Raise ``UserError`` for every shape, since an improper density cannot be sampled."""
        raise UserError("a flat prior cannot be sampled; use priors.normal, or sample a guide")
