"""One level's training.

``loop`` (:func:`train`) repeats ``epoch`` and ``step``, which a loop of one's own can call too. ``state`` holds where a training
is, ``hooks`` what a caller may do meanwhile, ``schedule`` the rates of every step, and ``history`` the row of every epoch.
``graph`` records a step once and replays it. ``checks`` holds what is refused, and ``memory`` estimates what a step takes.
``precision`` measures whether bf16 is faster, and ``sparsity`` whether sparse layers are; ``trial`` has what both measure with.
"""

from pyro_lottery.training.checks import as_data, check_batches, check_data
from pyro_lottery.training.epoch import epoch
from pyro_lottery.training.history import COLUMNS, History, columns, measure_name
from pyro_lottery.training.hooks import Hooks
from pyro_lottery.training.loop import train
from pyro_lottery.training.memory import step_memory, too_large
from pyro_lottery.training.precision import precision_for_batch, precision_for_data
from pyro_lottery.training.schedule import kl_factor, learning_rate, steps_in, steps_per_epoch
from pyro_lottery.training.sparsity import sparse_for_data
from pyro_lottery.training.state import TrainState, mask_of
from pyro_lottery.training.step import step

__all__ = [
    "COLUMNS", "History", "Hooks", "TrainState", "as_data", "check_batches", "check_data", "columns", "epoch", "kl_factor",
    "learning_rate", "mask_of", "measure_name", "precision_for_batch", "precision_for_data", "sparse_for_data", "step", "step_memory", "steps_in",
    "steps_per_epoch", "too_large", "train",
]  # fmt: skip
