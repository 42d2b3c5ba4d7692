"""Bayesian lottery tickets on Pyro: sparse Bayesian neural networks by iterative magnitude pruning."""

import pyro as _pyro

# Parameters live in their modules, so that two networks with the same site names do not share them through Pyro's
# global store. Pyro reads this setting whenever a PyroModule is touched, so it is set once, for the process.
_pyro.settings.set(module_local_params=True)

from pyro_lottery import data, draw, guides, handlers, masks, metrics, priors, scores, tables, tickets  # noqa: E402
from pyro_lottery.config import Config, preset  # noqa: E402
from pyro_lottery.elbo import ELBO  # noqa: E402
from pyro_lottery.errors import UserError  # noqa: E402
from pyro_lottery.guides import posterior  # noqa: E402
from pyro_lottery.model import BayesianClassifier, BayesianRegressor, bayesianize_  # noqa: E402
from pyro_lottery.nets import create_model, list_models  # noqa: E402
from pyro_lottery.prediction import predict, predict_mean  # noqa: E402
from pyro_lottery.runs import load_run  # noqa: E402
from pyro_lottery.tickets import compare  # noqa: E402
from pyro_lottery.training import train  # noqa: E402
from pyro_lottery.types import LevelResult, Mask, Posterior, Ticket  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "BayesianClassifier",
    "BayesianRegressor",
    "Config",
    "LevelResult",
    "Mask",
    "Posterior",
    "Ticket",
    "UserError",
    "bayesianize_",
    "compare",
    "create_model",
    "data",
    "draw",
    "guides",
    "handlers",
    "list_models",
    "load_run",
    "masks",
    "metrics",
    "posterior",
    "predict",
    "predict_mean",
    "preset",
    "priors",
    "scores",
    "tables",
    "tickets",
    "train",
]  # fmt: skip
