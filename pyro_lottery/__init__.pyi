from . import (
    data,
    errors,
    guides,
    handlers,
    masks,
    metrics,
    plot,
    posteriors,
    prediction,
    priors,
    runs,
    schedules,
    scores,
    seeds,
    tables,
    tickets,
    training,
)
from .elbo import ELBO
from .errors import UserError
from .find import find_tickets
from .guides import posterior
from .model import BayesianClassifier, BayesianNetwork, bayesianize_
from .model.regression import BayesianRegressor
from .nets import create_model, list_models
from .prediction import predict, predict_mean, predictive
from .runs.config import Config, preset
from .runs.ensemble import ensemble
from .runs.loaded import load_run
from .runs.nuts import nuts
from .tickets import compare
from .training import TrainState, train
from .types import LevelResult, Mask, Posterior, Ticket

draw = plot
__version__: str
__all__ = [
    "ELBO", "BayesianClassifier", "BayesianNetwork", "BayesianRegressor", "Config", "LevelResult", "Mask", "Posterior",
    "Ticket", "TrainState", "UserError", "bayesianize_", "compare", "create_model", "data", "draw", "ensemble", "errors", "find_tickets",
    "guides", "handlers", "list_models", "load_run", "masks", "metrics", "nuts", "plot", "posterior", "posteriors", "predict", "predict_mean",
    "prediction", "predictive", "preset", "priors", "runs", "schedules", "scores", "seeds", "tables", "tickets", "train", "training",
]  # fmt: skip
