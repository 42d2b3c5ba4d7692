"""Bayesian models: a network with a prior on its weights and a likelihood."""

from pyro_lottery.model.network import (
    BayesianClassifier,
    BayesianNetwork,
    bayesianize_,
    one_tensor,
    prunable_sites,
    random_parameters,
)

__all__ = ["BayesianClassifier", "BayesianNetwork", "bayesianize_", "one_tensor", "prunable_sites", "random_parameters"]
