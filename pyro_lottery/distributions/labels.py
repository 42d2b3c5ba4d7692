"""The likelihood of labels."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions.utils import lazy_property

_NO_LABEL = -(2**63)
"""cross_entropy would ignore the label -100, which is an error here as all labels that no class has are."""


class Labels(dist.Categorical):
    """A Categorical over the classes of ``scores`` [..., classes], logits that need not be normalised.

    Its log-probabilities are torch's cross-entropy, which is one kernel where Categorical takes a dozen. ``logits``, ``probs`` and
    all else are those of Categorical.
    """

    def __init__(self, scores: Tensor):
        self.scores, self._num_events = scores, scores.shape[-1]
        dist.TorchDistribution.__init__(self, scores.shape[:-1])

    @lazy_property
    def logits(self) -> Tensor:
        """Log-probabilities of the classes [..., classes]."""
        return self.scores.log_softmax(-1)

    @property
    def _param(self) -> Tensor:  # type: ignore[override]
        return self.logits

    def expand(self, batch_shape: Any, _instance: Any = None) -> Labels:
        return Labels(self.scores.expand(*Size(batch_shape), self._num_events))

    def log_prob(self, value: Tensor) -> Tensor:
        if self.scores.ndim != 2 or value.shape != self.batch_shape:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        return -F.cross_entropy(self.scores, value.long(), reduction="none", ignore_index=_NO_LABEL)
