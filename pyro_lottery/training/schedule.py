"""The number of steps in an epoch, the learning rate of every step, and the KL's factor in every epoch."""

from __future__ import annotations

from pyro_lottery.data import Split, Stream


def kl_factor(epoch: int, kl_warmup_epochs: int) -> float:
    """The factor of T·KL in ``epoch``, counted from 0: (epoch + ½)/K in the first K epochs, then 1.

    It is a line from 0 to 1, evaluated in the middle of each epoch (Sønderby et al. 2016, Ladder Variational Autoencoders).

    >>> [kl_factor(epoch, 2) for epoch in range(4)]
    [0.25, 0.75, 1.0, 1.0]
    """
    return (epoch + 0.5) / kl_warmup_epochs if epoch < kl_warmup_epochs else 1.0


def learning_rate(
    epoch: int, step: int, steps: int, lr: float, milestones: tuple[int, ...], warmup_epochs: int
) -> float:
    """The learning rate of a step: lr × 0.1^(milestones passed), and a linear rise over the first ``warmup_epochs`` (paper §4).

    >>> [learning_rate(epoch, 0, 10, 1.0, (2, 3), 0) for epoch in range(3)]
    [1.0, 1.0, 0.1]
    """
    value = lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    if epoch < warmup_epochs:
        value *= (epoch * steps + step + 1) / (warmup_epochs * steps)
    return value


def steps_per_epoch(count: int, batch_size: int, least: int = 2) -> int:
    """The number of batches in an epoch of ``count`` examples; what is left of fewer than ``least`` joins the batch before.

    >>> [steps_per_epoch(count, 4) for count in (1, 8, 9, 10)]
    [1, 2, 2, 3]
    """
    return max(1, count // batch_size + (count % batch_size >= least))


def steps_in(split: Split | Stream, batch_size: int, least: int = 2) -> int:
    """The number of batches in an epoch of ``split``; see :func:`steps_per_epoch`."""
    return split.steps if isinstance(split, Stream) else steps_per_epoch(len(split), batch_size, least)
