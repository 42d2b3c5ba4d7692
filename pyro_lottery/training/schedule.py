"""Steps of an epoch, the learning rate of each, and the weight of the KL."""

from __future__ import annotations

from pyro_lottery.data import Split, Stream


def kl_factor(epoch: int, kl_warmup_epochs: int) -> float:
    """What multiplies T·KL in ``epoch`` (from 0): (epoch + ½)/K over the first K epochs, a line from 0 to 1 taken at each
    epoch's middle, and then 1 (Sønderby et al. 2016, Ladder Variational Autoencoders).

    >>> [kl_factor(epoch, 2) for epoch in range(4)]
    [0.25, 0.75, 1.0, 1.0]
    """
    return (epoch + 0.5) / kl_warmup_epochs if epoch < kl_warmup_epochs else 1.0


def learning_rate(
    epoch: int, step: int, steps: int, lr: float, milestones: tuple[int, ...], warmup_epochs: int
) -> float:
    """lr × 0.1^(milestones passed), rising linearly over the first ``warmup_epochs`` (paper §4).

    >>> [learning_rate(epoch, 0, 10, 1.0, (2, 3), 0) for epoch in range(3)]
    [1.0, 1.0, 0.1]
    """
    value = lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    if epoch < warmup_epochs:
        value *= (epoch * steps + step + 1) / (warmup_epochs * steps)
    return value


def steps_per_epoch(count: int, batch_size: int, least: int = 2) -> int:
    """Batches in an epoch of ``count`` examples: a rest of fewer than ``least`` joins the batch before it.

    >>> [steps_per_epoch(count, 4) for count in (1, 8, 9, 10)]
    [1, 2, 2, 3]
    """
    return max(1, count // batch_size + (count % batch_size >= least))


def steps_in(split: Split | Stream, batch_size: int, least: int = 2) -> int:
    """Batches in an epoch of ``split``."""
    return split.steps if isinstance(split, Stream) else steps_per_epoch(len(split), batch_size, least)
