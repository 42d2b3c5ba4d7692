"""Bayesian models: a network with a prior on its weights and a likelihood.

``layers`` says which parameters can be random, and ``bayesianize`` makes them sample sites. ``network`` is the model of any
likelihood, ``classifier`` and ``regression`` are the usual ones. ``inputs``, ``outputs``, ``likelihoods`` and
``mask_check`` hold what is checked on the way, and ``mixture`` is the posterior predictive.
"""

from pyro_lottery.model.bayesianize import bayesianize_
from pyro_lottery.model.classifier import BayesianClassifier
from pyro_lottery.model.layers import prunable_sites, random_parameters
from pyro_lottery.model.network import BayesianNetwork
from pyro_lottery.model.outputs import one_tensor

__all__ = ["BayesianClassifier", "BayesianNetwork", "bayesianize_", "one_tensor", "prunable_sites", "random_parameters"]
