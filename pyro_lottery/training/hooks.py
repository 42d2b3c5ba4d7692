"""What a caller may do while a level trains."""

from __future__ import annotations

from torch.optim import Adam

from pyro_lottery.training.state import Progress


class Hooks:
    """What a caller may do while a level trains; each method may be left as it is."""

    def start(self, optimizer: Adam) -> Progress | None:
        """Called before the first step; training goes on from a returned Progress whose states have been loaded."""

    def stopping(self) -> bool:
        """Asked after every step but an epoch's last; True leads to :meth:`stop`."""
        return False

    def stop(self, progress: Progress, optimizer: Adam) -> None:
        """Called within an epoch when :meth:`stopping` said so: save ``progress`` and raise."""

    def check(self, progress: Progress, steps: int, nll: float, measured: float) -> None:
        """Called every ``CHECK_EVERY`` steps and at an epoch's end with the epoch's nll so far, and its accuracy or RMSE."""

    def epoch(self, progress: Progress, optimizer: Adam) -> None:
        """Called after every epoch, when its row is in the history."""
