"""One level's training: the loop, one step of it, where it is, and what it refuses."""

from pyro_lottery.training.checks import check_batches, check_data
from pyro_lottery.training.epoch import epoch
from pyro_lottery.training.history import COLUMNS, History, columns, measure
from pyro_lottery.training.hooks import Hooks
from pyro_lottery.training.loop import train
from pyro_lottery.training.schedule import kl_factor, learning_rate, steps_in, steps_per_epoch
from pyro_lottery.training.state import TrainState
from pyro_lottery.training.step import step

__all__ = [
    "COLUMNS",
    "History",
    "Hooks",
    "TrainState",
    "check_batches",
    "check_data",
    "columns",
    "epoch",
    "kl_factor",
    "learning_rate",
    "measure",
    "step",
    "steps_in",
    "steps_per_epoch",
    "train",
]
