"""Distributions of weights with masks, the shared draw of a mean-field guide, and the likelihood of labels."""

from pyro_lottery.distributions.draw import Draw, spread
from pyro_lottery.distributions.labels import Labels
from pyro_lottery.distributions.look import base, elementary, one_number
from pyro_lottery.distributions.pruned import PointMass, Pruned
from pyro_lottery.distributions.site_normal import SiteNormal

__all__ = ["Draw", "Labels", "PointMass", "Pruned", "SiteNormal", "base", "elementary", "one_number", "spread"]
