"""Functions of the caller that training calls."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from pyro_lottery.training.state import TrainState
from pyro_lottery.types import Mask


class Hooks:
    """Methods that :func:`train` calls; a subclass overrides those that it needs."""

    def begin(self, mask: Mask) -> Mask:
        """Called before a training under a mask that moves: the mask that it goes on with, here that of its start."""
        return mask

    def start(self, state: TrainState) -> None:
        """Called before the first step: may load ``state``, and the values of the guide and the network."""

    def stopping(self) -> bool:
        """Asked after every step but an epoch's last; True leads to :meth:`stop`."""
        return False

    def stop(self, state: TrainState) -> None:
        """Called within an epoch when :meth:`stopping` is True: save ``state`` and raise."""

    def progress(self, state: TrainState, steps: int, nll: float, measured: float) -> None:
        """Called every ``CHECK_EVERY`` steps (``AGREE_EVERY`` with several ranks) and at an epoch's end with the epoch's nll so far, and its accuracy or RMSE."""

    def measuring(self) -> AbstractContextManager[None]:
        """Entered while the trained network is measured, after the last epoch."""
        return nullcontext()

    def epoch_ended(self, state: TrainState) -> None:
        """Called after every epoch, when its row is in ``state.history``."""
