"""The prior of each site: one function for all sites, or the first glob of a dict that matches the site's name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size

from pyro_lottery.errors import UserError

Prior = Callable[[str, Size], dist.TorchDistribution]
AnyPrior = Prior | dist.TorchDistribution | Mapping[str, Prior | dist.TorchDistribution | None]


def of_sites(prior: AnyPrior, sites: Iterable[str]) -> dict[str, Prior | None]:
    """Convert a prior of any kind to one function ``(site, shape) -> distribution`` per site, or None if deterministic.

    In a dict, the first glob that matches a site's name applies: ``{"*.conv1.weight": laplace(0.1), "*": normal(1.0)}``,
    or ``{"layer4.*": normal(1.0), "*": None}``. Raises ``UserError`` if a glob matches no site or is never reached, or if
    no glob matches a site.
    """
    if not isinstance(prior, Mapping):
        return dict.fromkeys(sites, _function(prior))
    sites, globs = list(sites), {glob: None if value is None else _function(value) for glob, value in prior.items()}
    for glob in globs:
        if not any(fnmatchcase(site, glob) for site in sites):
            near = difflib.get_close_matches(glob.replace("*", ""), sites, n=3, cutoff=0.3) or sites[:3]
            raise UserError(f"the prior's glob {glob!r} matches no site; similar names: {', '.join(near)}")
    chosen = {site: next((glob for glob in globs if fnmatchcase(site, glob)), None) for site in sites}
    for site, first in chosen.items():
        if first is None:
            raise UserError(f"no glob of the prior matches site {site!r}; add '*' for all other sites")
    for glob in globs:
        if glob not in chosen.values():
            site = next(site for site in sites if fnmatchcase(site, glob))
            before = next(other for other in globs if fnmatchcase(site, other))
            raise UserError(
                f"the prior's glob {glob!r} is never used, since {before!r} comes first; put {glob!r} before it"
            )
    return {site: globs[first] for site, first in chosen.items() if first is not None}


def of_site(prior: Prior, site: str, shape: Size) -> dist.TorchDistribution:
    """The distribution that ``prior`` gives for one site; raises ``UserError`` with the site's name if it fails or gives none."""
    try:
        found = prior(site, shape)
    except UserError:
        raise
    except Exception as error:  # a user's function may fail in any way
        text = str(error).split("\n")[0]
        raise UserError(f"the prior of {site!r} failed ({type(error).__name__}: {text}); {_EXPECTED}") from error
    if not isinstance(found, TorchDistributionMixin):
        raise UserError(f"the prior of {site!r} returned {found!r}; {_EXPECTED}")
    return found  # type: ignore[return-value]


_EXPECTED = "a prior must be a pyro.distributions object, or a function (site, shape) -> distribution, such as priors.normal(1.0)"


class Always:
    """A prior that is the same distribution for every site."""

    def __init__(self, distribution: Any):
        self.distribution = distribution

    def __call__(self, site: str, shape: Size) -> dist.TorchDistribution:
        return self.distribution


def _function(prior: Any) -> Prior:
    if isinstance(prior, torch.distributions.Distribution):
        return Always(prior)
    if not callable(prior):
        raise UserError(f"{_EXPECTED}, or a dict of these by glob (None to stay deterministic); got {prior!r}")
    return prior
