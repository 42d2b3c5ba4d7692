"""Priors on weights: a distribution per weight, a function ``(site, shape) -> distribution``, or a dict of these by glob.

In a dict, the first glob that matches a site's name applies, and None keeps its parameters deterministic:
``{"layer4.*": normal(1.0), "*": None}``.

``families`` holds the usual ones, ``improper`` the flat one and ``continual`` a posterior as a prior; ``named`` finds them by
name. ``by_site`` gives each site its own, and ``site_prior`` is that one as a module of the network. ``hyperpriors`` is for
priors that sample, ``tensors`` for those that learn, and ``own_parameters`` keeps what is learned in its module.
"""

from pyro_lottery.priors.by_site import AnyPrior, Prior, of_site, of_sites
from pyro_lottery.priors.continual import from_posterior
from pyro_lottery.priors.families import FanIn, fan_in, laplace, mixture, normal, student_t
from pyro_lottery.priors.hyperpriors import OneSite
from pyro_lottery.priors.improper import Flat, flat
from pyro_lottery.priors.named import KINDS, by_name
from pyro_lottery.priors.site_prior import SitePrior
from pyro_lottery.priors.tensors import detached

__all__ = [
    "KINDS", "AnyPrior", "FanIn", "Flat", "OneSite", "Prior", "SitePrior", "by_name", "detached", "fan_in", "flat",
    "from_posterior", "laplace", "mixture", "normal", "of_site", "of_sites", "student_t",
]  # fmt: skip
