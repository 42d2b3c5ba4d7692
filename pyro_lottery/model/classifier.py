"""A network that classifies."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_lottery.distributions import Labels, elementary
from pyro_lottery.errors import UserError
from pyro_lottery.model.network import BayesianNetwork


class BayesianClassifier(BayesianNetwork):
    """A ``BayesianNetwork`` whose outputs [n, classes] are the logits of a categorical likelihood.

    Targets are labels [n], integers from 0 to classes − 1. Raises ``UserError`` for other outputs and targets.
    """

    task = "classification"

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        return Labels(_logits(output))

    def checked_targets(self, y: Tensor, likelihood: Any, output: Tensor) -> Tensor:
        if isinstance(y, Tensor) and y.shape == output.shape:
            raise UserError(
                f"labels have shape {tuple(y.shape)}, like one-hot or probabilities; use y.argmax(1), of shape ({len(y)},)"
            )
        return super().checked_targets(y, likelihood, output)

    def expected(self, output: Tensor) -> Tensor:
        if type(self).likelihood is BayesianClassifier.likelihood:
            return _logits(output).softmax(-1)
        return elementary(self.likelihood(output)).probs

    def tally(self, output: Tensor, targets: Tensor) -> Tensor:
        found = output if type(self).likelihood is BayesianClassifier.likelihood else self.expected(output)
        return (found.argmax(-1) == targets.long()).sum()


def _logits(output: Tensor) -> Tensor:
    if output.ndim != 2 or output.shape[1] < 2:
        raise UserError(
            f"a classifier's outputs must be logits [n, classes] with at least two classes, got {tuple(output.shape)}; "
            "for other targets (one logit, several labels, one class per pixel) subclass pl.BayesianNetwork"
        )
    return output
