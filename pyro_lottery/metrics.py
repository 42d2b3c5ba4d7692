"""Measures of predictive probabilities [n, classes] against labels [n]; pure functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

BINS = 20
"""Equal-width confidence bins of MACE and ECE (paper §4)."""


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is the label."""
    return float(multiclass_accuracy(probs, labels, probs.shape[1], average="micro"))


def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean of −log p(label) in nats; probabilities below the smallest normal float count as that."""
    return float(F.nll_loss(probs.double().clamp_min(torch.finfo(torch.float32).tiny).log(), labels))


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score, the mean of Σ_c (p_c − 1[c = label])², from 0 to 2."""
    return float((probs.double() - F.one_hot(labels, probs.shape[1])).square().sum(1).mean())


def ece(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error Σ_b (|S_b|/n) |acc(S_b) − conf(S_b)| over equal-width bins."""
    # torchmetrics works in float32 and would put a confidence of exactly 1 into a bin of its own.
    below_one = probs.float().clamp_max(1 - 2**-24)
    return float(multiclass_calibration_error(below_one, labels, probs.shape[1], n_bins=bins, norm="l1"))


def mace(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean absolute calibration error (paper §4): (1/B) Σ_b |acc(S_b) − conf(S_b)| over the bins that are not empty."""
    confidence, predicted = probs.double().max(1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.double, device=probs.device)
    gap.index_add_(0, index, (predicted == labels).double() - confidence)
    count = torch.bincount(index, minlength=bins)
    return float((gap[count > 0].abs() / count[count > 0]).mean())


def all_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, NLL, MACE, ECE and Brier score by name."""
    return {f.__name__: f(probs, labels) for f in (accuracy, nll, mace, ece, brier)}
