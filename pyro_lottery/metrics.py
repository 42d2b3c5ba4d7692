"""Measures of predictive probabilities [n, classes] against labels [n]; pure functions.

An example whose probabilities or score are NaN counts as wrong in :func:`accuracy`; every other measure is then NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_roc,
    multiclass_calibration_error,
)

BINS = 20
"""Equal-width confidence bins of MACE and ECE (paper §4)."""


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is the label."""
    right = (probs.argmax(1) == labels) & ~probs.isnan().any(1)  # the largest of NaN and others is NaN
    return float(right.sum() / len(right))


def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean of −log p(label) in nats; probabilities below the smallest normal float count as that."""
    return float(F.nll_loss(probs.double().clamp_min(torch.finfo(torch.float32).tiny).log(), labels))


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score, the mean of Σ_c (p_c − 1[c = label])², from 0 to 2."""
    return float((probs.double() - F.one_hot(labels, probs.shape[1])).square().sum(1).mean())


def ece(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error Σ_b (|S_b|/n) |acc(S_b) − conf(S_b)| over equal-width bins."""
    if probs.isnan().any():  # torchmetrics would bin it
        return math.nan
    # torchmetrics works in float32 and would put a confidence of exactly 1 into a bin of its own.
    below_one = probs.float().clamp_max(1 - 2**-24)
    return float(multiclass_calibration_error(below_one, labels, probs.shape[1], n_bins=bins, norm="l1"))


def mace(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean absolute calibration error (paper §4): (1/B) Σ_b |acc(S_b) − conf(S_b)| over the bins that are not empty."""
    confidence, right, _ = reliability(probs, labels, bins)
    return float((right - confidence).abs().mean())


def reliability(probs: Tensor, labels: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """The reliability diagram: mean confidence, accuracy and number of examples of each of the equal-width bins of
    confidence that is not empty.
    """
    confidence, predicted = probs.double().max(1)
    # in float32, in which probabilities come and torchmetrics bins: 0.7 as float32 is on an edge, as a double below it
    edges = torch.linspace(0, 1, bins + 1, device=probs.device)
    index = (torch.bucketize(confidence.float(), edges, right=True) - 1).clamp_max(bins - 1)
    sums = torch.zeros(2, bins, dtype=torch.double, device=probs.device)
    sums.index_add_(1, index, torch.stack([confidence, (predicted == labels).double()]))
    count = torch.bincount(index, minlength=bins)
    mean, right = sums[:, count > 0] / count[count > 0]
    return mean, right, count[count > 0]


def all_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, NLL, MACE, ECE and Brier score by name."""
    return {f.__name__: f(probs, labels) for f in (accuracy, nll, mace, ece, brier)}


def entropy(probs: Tensor) -> Tensor:
    """−Σ_c p_c log p_c in nats [n]; 0·log 0 is 0."""
    return torch.special.entr(probs.double()).sum(-1)


def selective(confidence: Tensor, correct: Tensor) -> Tensor:
    """Share of wrong answers [n] among the k most confident, for k = 1 to n; answers of equal confidence count alike."""
    if confidence.isnan().any():
        return torch.full(confidence.shape, math.nan, dtype=torch.double, device=confidence.device)
    order = confidence.double().argsort(descending=True, stable=True)
    ordered, wrong = confidence.double()[order], 1 - correct.double()[order]
    _, ties, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    share = torch.zeros(len(counts), dtype=torch.double, device=wrong.device).index_add_(0, ties, wrong) / counts
    return share[ties].cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)


def aurc(confidence: Tensor, correct: Tensor) -> float:
    """Area under the risk-coverage curve: the mean of :func:`selective` over all coverages (Geifman et al. 2019)."""
    return float(selective(confidence, correct).mean())


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score of ``outside`` is above one of ``inside``, ties half (area under the ROC curve)."""
    scored = _scored(inside, outside)
    return math.nan if scored is None else float(binary_auroc(*scored))


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """Share of ``inside`` taken for outside at the threshold at which 95 % of ``outside`` are found."""
    scored = _scored(inside, outside)
    if scored is None:
        return math.nan
    false_positive, true_positive, _ = binary_roc(*scored)
    return float(false_positive[true_positive >= 0.95][0])


def _scored(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ranks from 0 to 1 and labels, 1 outside; None if a score is NaN.

    Ranks, since torchmetrics takes scores beyond [0, 1] for logits, and its sigmoid would merge large ones.
    """
    scores = torch.cat([inside, outside]).double()
    if scores.isnan().any():
        return None
    ranks = scores.unique(return_inverse=True)[1].double()
    labels = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return ranks / ranks.max().clamp_min(1), labels.to(scores.device)
