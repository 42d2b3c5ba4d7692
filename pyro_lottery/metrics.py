"""Measures of predictive probabilities [n, classes] against labels [n], and of real predictions; pure functions.

Tensors and numpy arrays of any device and dtype are taken; what is no probability or no label raises ``UserError`` in one
line. An example whose probabilities or score are NaN counts as wrong in :func:`accuracy`; every other measure is then NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_roc,
    multiclass_calibration_error,
)

from pyro_lottery.errors import UserError
from pyro_lottery.trees import as_real

LEVELS = (50, 80, 95)
"""Of central predictive intervals, in percent, whose coverage is measured."""
BINS = 20
"""Equal-width confidence bins of MACE and ECE (paper §4)."""


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is the label."""
    probs, labels = _checked(probs, labels)
    right = (probs.argmax(1) == labels) & ~probs.isnan().any(1)  # the largest of NaN and others is NaN
    return float(right.sum() / len(right))


def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean of −log p(label) in nats; probabilities below the smallest normal float count as that."""
    probs, labels = _checked(probs, labels)
    if probs.isnan().any():  # perhaps not in the label's column
        return math.nan
    return float(F.nll_loss(probs.double().clamp_min(torch.finfo(torch.float32).tiny).log(), labels))


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score, the mean of Σ_c (p_c − 1[c = label])², from 0 to 2."""
    probs, labels = _checked(probs, labels)
    return float((probs.double() - F.one_hot(labels, probs.shape[1])).square().sum(1).mean())


def ece(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error Σ_b (|S_b|/n) |acc(S_b) − conf(S_b)| over equal-width bins."""
    probs, labels = _checked(probs, labels)
    _check_bins(bins)
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
    probs, labels = _checked(probs, labels)
    _check_bins(bins)
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
    """−Σ_c p_c log p_c in nats [n], or [...] of probabilities [..., classes]; 0·log 0 is 0."""
    probs = _probabilities(probs)
    return torch.special.entr(probs.double()).sum(-1)


def selective(confidence: Tensor, correct: Tensor) -> Tensor:
    """Share of wrong answers [n] among the k most confident, for k = 1 to n; answers of equal confidence count alike.

    ``confidence`` [n] is any score, and ``correct`` [n] says 0 or 1.
    """
    confidence = _scores(confidence, "confidence")
    correct = as_real(correct).to(confidence.device)
    if correct.shape != confidence.shape or bool(((correct != 0) & (correct != 1)).any()):
        raise UserError(
            f"correct must be 0 or 1 for each of {len(confidence)} answers, as (probs.argmax(1) == labels) is, got values of "
            f"{tuple(correct.shape)}"
        )
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


def rmse(mean: Tensor, targets: Tensor) -> float:
    """Root mean square of mean − target over all elements of [n, ...]."""
    mean, targets = _alike(mean=mean, targets=targets)
    return float((mean - targets).square().mean().sqrt())


def coverage(lower: Tensor, upper: Tensor, targets: Tensor) -> float:
    """Share of targets' elements [n, ...] in the interval from ``lower`` to ``upper``, both included."""
    lower, upper, targets = _alike(lower=lower, upper=upper, targets=targets)
    if (lower > upper).any():
        raise UserError("lower is above upper for some targets; the order is coverage(lower, upper, targets)")
    inside = ((lower <= targets) & (targets <= upper)).double()
    missing = lower.isnan() | upper.isnan() | targets.isnan()
    return float(torch.where(missing, math.nan, inside).mean())


def regression(predictive: Any, targets: Tensor) -> dict[str, float]:
    """RMSE of the mean, mean −log p(y | x) of a whole target in nats, and the coverage of the central intervals of ``LEVELS``
    percent by name, from what :func:`pyro_lottery.predictive` gives for real targets [n, ...].
    """
    if not hasattr(predictive, "interval"):
        raise UserError(
            "regression is measured of pl.predictive(...) for a model with real targets; all_metrics(probs, labels) measures "
            "class probabilities"
        )
    targets = as_real(targets)
    found = {"rmse": rmse(predictive.mean, targets), "nll": -float(predictive.log_prob(targets).double().mean())}
    for level in LEVELS:
        lower, upper = predictive.interval(level / 100)
        found[f"coverage_{level}"] = coverage(lower, upper, targets)
    return found


def _probabilities(probs: Any) -> Tensor:
    """``probs`` [..., classes], floating; ``UserError`` for logits, and for what is no distribution over classes."""
    probs = as_real(probs)
    if probs.ndim < 2 or not probs.shape[-1] > 1 or not probs.is_floating_point() or not probs.numel():
        raise UserError(
            f"probabilities must be floats [n, classes] of at least one example and two classes, got {tuple(probs.shape)} "
            f"{probs.dtype}"
        )
    rounding = 1e-3 if probs.dtype in (torch.float32, torch.float64) else 2e-2
    if bool((probs < 0).any()) or bool(((probs.double().sum(-1) - 1).abs() > rounding).any()):  # not so of NaN
        raise UserError(
            "probabilities must be positive and sum to 1 for each example; of logits, give logits.softmax(1)"
        )
    return probs


def _checked(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Probabilities [n, classes] and labels [n], int64 and on the same device; ``UserError`` for what is neither."""
    probs = _probabilities(probs)
    if probs.ndim > 2:
        raise UserError(f"probabilities must be [n, classes], got {tuple(probs.shape)}; average draws by probs.mean(0)")
    labels = as_real(labels).to(probs.device)
    if labels.shape == probs.shape:
        raise UserError(f"labels are {tuple(labels.shape)}, one-hot or probabilities; give labels.argmax(1)")
    if labels.shape != probs.shape[:1]:
        raise UserError(f"labels must be ({len(probs)},), one for each example, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise UserError(f"labels must be integers from 0 to classes − 1, got {labels.dtype}; give labels.long()")
    labels = labels.long()
    lowest, highest = labels.aminmax()
    if lowest < 0 or highest >= probs.shape[1]:
        odd = int(lowest if lowest < 0 else highest)
        raise UserError(
            f"a label is {odd}, but probabilities of {probs.shape[1]} classes are from 0 to {probs.shape[1] - 1}"
        )
    return probs, labels


def _alike(**given: Any) -> list[Tensor]:
    """Real predictions and targets in double precision; ``UserError`` where shapes differ, which would broadcast."""
    found = {name: as_real(value) for name, value in given.items()}
    first = next(iter(found.values()))
    for name, value in found.items():
        if value.shape != first.shape:
            raise UserError(f"{name} are {tuple(value.shape)}, but {next(iter(found))} is {tuple(first.shape)}")
    if not first.numel():
        raise UserError("there are no targets to measure")
    return [value.to(first.device).double() for value in found.values()]


def _check_bins(bins: int) -> None:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise UserError(f"the number of bins must be a whole number, at least 1, got {bins!r}")


def _scores(value: Any, name: str) -> Tensor:
    found = as_real(value)
    if found.ndim != 1 or not len(found):
        raise UserError(f"{name} must be [n], one score for each of at least one example, got {tuple(found.shape)}")
    return found


def _scored(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ranks from 0 to 1 and labels, 1 outside; None if a score is NaN.

    Ranks, since torchmetrics takes scores beyond [0, 1] for logits, and its sigmoid would merge large ones.
    """
    inside, outside = _scores(inside, "inside"), _scores(outside, "outside")
    scores = torch.cat([inside.double(), outside.to(inside.device).double()])
    if scores.isnan().any():
        return None
    ranks = scores.unique(return_inverse=True)[1].double()
    labels = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return ranks / ranks.max().clamp_min(1), labels.to(scores.device)
