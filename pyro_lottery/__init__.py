"""Bayesian lottery tickets on Pyro: sparse Bayesian neural networks by iterative magnitude pruning."""

from pyro_lottery import data, guides, handlers, masks, metrics, plot, priors, scores, tables, tickets
from pyro_lottery.elbo import ELBO
from pyro_lottery.errors import UserError
from pyro_lottery.find import find_tickets
from pyro_lottery.guides import posterior
from pyro_lottery.model import BayesianClassifier, BayesianNetwork, bayesianize_
from pyro_lottery.model.regression import BayesianRegressor
from pyro_lottery.nets import create_model, list_models
from pyro_lottery.prediction import predict, predict_mean, predictive
from pyro_lottery.runs.config import Config, preset
from pyro_lottery.runs.loaded import load_run
from pyro_lottery.tickets import compare
from pyro_lottery.training import TrainState, train
from pyro_lottery.types import LevelResult, Mask, Posterior, Ticket

draw = plot
"""The former name of ``pyro_lottery.plot``."""
__version__ = "0.1.0"

__all__ = [
    "ELBO", "BayesianClassifier", "BayesianNetwork", "BayesianRegressor", "Config", "LevelResult", "Mask", "Posterior",
    "Ticket", "TrainState", "UserError", "bayesianize_", "compare", "create_model", "data", "draw", "find_tickets",
    "guides", "handlers", "list_models", "load_run", "masks", "metrics", "plot", "posterior", "predict", "predict_mean",
    "predictive", "preset", "priors", "scores", "tables", "tickets", "train",
]  # fmt: skip
