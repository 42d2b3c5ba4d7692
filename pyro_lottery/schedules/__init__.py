"""How density falls while one network trains: a schedule moves the mask between steps.

Iterative pruning trains a network once for each density. The schedules here need one training: :class:`Gradual` prunes a dense
network, and :class:`Dynamic` starts sparse and exchanges weights. :func:`train` is :func:`pyro_lottery.train` under a mask that moves.
"""

from pyro_lottery.schedules.dynamic import Dynamic, erdos_renyi
from pyro_lottery.schedules.gradual import Gradual
from pyro_lottery.schedules.moving import LAST_MOVE, Move, Schedule, check_guide, grown, steps_between_moves, train

__all__ = [
    "LAST_MOVE",
    "Dynamic",
    "Gradual",
    "Move",
    "Schedule",
    "check_guide",
    "erdos_renyi",
    "grown",
    "steps_between_moves",
    "train",
]
