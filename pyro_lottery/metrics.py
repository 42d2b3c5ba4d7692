"""Metrics of predicted probabilities [n, classes] against labels [n], and of real predictions; all are pure functions.

They accept tensors and numpy arrays of any device and dtype. Probabilities must be at least 0 and sum to 1; labels are
integers from 0 to classes − 1. Every metric raises ``UserError`` for other values and shapes. An example with NaN
probabilities counts as wrong in ``accuracy``; every other metric is then NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_lottery.errors import UserError, check_counts
from pyro_lottery.trees import as_real

LEVELS = (50, 80, 95)
"""The probabilities, in percent, of the central predictive intervals whose coverage is measured."""
BINS = 20
"""The number of equal-width confidence bins of MACE and ECE (paper §4)."""
ROUNDING = 1e-6
"""Nats: what two entropies of probabilities in single precision differ by if these are equal."""


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """The share of examples whose most probable class is the label: ``probs`` [n, classes], ``labels`` [n]."""
    probs, labels = _checked(probs, labels)
    right = (probs.argmax(1) == labels) & ~probs.isnan().any(1)  # NaN counts as the largest value
    return float(right.double().mean())


def nll(probs: Tensor, labels: Tensor) -> float:
    """The mean of −log p(label) in nats: ``probs`` [n, classes], ``labels`` [n].

    Probabilities below the smallest normal float32 count as that number.
    """
    probs, labels = _checked(probs, labels)
    if probs.isnan().any():  # which may not be in the label's column
        return math.nan
    return float(F.nll_loss(probs.double().clamp_min(torch.finfo(torch.float32).tiny).log(), labels))


def brier(probs: Tensor, labels: Tensor) -> float:
    """The Brier score, the mean of Σ_c (p_c − 1[c = label])², from 0 to 2: ``probs`` [n, classes], ``labels`` [n]."""
    probs, labels = _checked(probs, labels)
    return float((probs.double() - F.one_hot(labels, probs.shape[1])).square().sum(1).mean())


def ece(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error Σ_b (|S_b|/n) |acc(S_b) − conf(S_b)| over ``bins`` equal-width confidence bins.

    ``probs`` is [n, classes], and ``labels`` [n].
    """
    # Not of torchmetrics, which sums in float32: 0.03 off for 4 million examples of one confidence.
    confidence, right, count = reliability(probs, labels, bins)
    return float(((right - confidence).abs() * count).sum() / count.sum())


def mace(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The mean absolute calibration error (1/B) Σ_b |acc(S_b) − conf(S_b)| over the B non-empty bins (paper §4).

    ``probs`` is [n, classes], and ``labels`` [n].
    """
    confidence, right, _ = reliability(probs, labels, bins)
    return float((right - confidence).abs().mean())


def smooth_ece(probs: Tensor, labels: Tensor) -> float:
    """The SmoothECE of Błasiok and Nakkiran (2023): the calibration error of a kernel regression, which needs no bins.

    ``probs`` is [n, classes], and ``labels`` [n]. The error is that of the confidence, and the width of the kernel is the authors'.
    """
    import relplot  # which imports seaborn

    probs, labels = _checked(probs, labels)
    if probs.isnan().any():
        return math.nan
    confidence, predicted = probs.double().max(1)
    return float(relplot.smECE(confidence.numpy(), (predicted == labels).double().numpy()))


def adaptive_ece(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error over ``bins`` bins with equal numbers of examples (Nguyen and O'Connor 2015).

    ``probs`` is [n, classes], and ``labels`` [n]. Examples are sorted by confidence; the numbers differ by one at most.
    """
    probs, labels = _checked(probs, labels)
    check_counts(1, **{"the number of bins": bins})
    if probs.isnan().any():
        return math.nan
    confidence, predicted = probs.double().max(1)
    order = confidence.argsort(stable=True)
    # Equal confidences, which a bin's edge may part, each count with their mean, whatever their order.
    _, group, sizes = confidence.unique(return_inverse=True, return_counts=True)
    gap = (predicted == labels).double() - confidence
    gaps = (torch.zeros_like(sizes, dtype=torch.double).scatter_add_(0, group, gap) / sizes)[group][order].tensor_split(
        bins
    )
    return float(torch.stack([gap.sum().abs() for gap in gaps]).sum() / len(labels))


def classwise_ece(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The mean over classes of the calibration error of p(class) (Kull et al. 2019), over ``bins`` equal-width bins.

    ``probs`` is [n, classes], and ``labels`` [n].
    """
    probs, labels = _checked(probs, labels)
    check_counts(1, **{"the number of bins": bins})
    if probs.isnan().any():
        return math.nan
    edges = torch.linspace(0, 1, bins + 1)
    index = (torch.bucketize(probs.float().contiguous(), edges, right=True) - 1).clamp_max(bins - 1)
    gaps = F.one_hot(labels, probs.shape[1]) - probs.double()
    sums = torch.zeros(bins, probs.shape[1], dtype=torch.double).scatter_add_(0, index, gaps)
    return float(sums.abs().sum(0).mean() / len(labels))


def calibrated_nll(probs: Tensor, labels: Tensor, splits: int = 5) -> float:
    """The NLL in nats after a temperature was fitted on the other half of the examples (Ashukha et al. 2020), under N(0, 0.5²) for log T.

    ``probs`` [n, classes] become probs^(1/T), normalised; ``labels`` is [n]. It is the mean over both halves of ``splits`` random halvings, always
    the same. The prior matters where a half has hardly an error, for which T without it would be nearly 0. Raises ``UserError`` for fewer than two examples.
    """
    probs, labels = _checked(probs, labels)
    if probs.isnan().any():
        return math.nan
    check_counts(1, splits=splits)
    if len(labels) < 2:
        raise UserError("a temperature needs at least two examples, one to fit it and one to measure")
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(splits):
        halves = torch.randperm(len(labels), generator=generator).tensor_split(2)
        for fitted, measured in (halves, halves[::-1]):
            powers = tempered(probs[measured], temperature(probs[fitted], labels[fitted], prior_scale=0.5))
            found.append(nll(powers, labels[measured]))
    return sum(found) / len(found)


def temperature(probs: Tensor, labels: Tensor, prior_scale: float = math.inf) -> float:
    """The temperature T, from 1/20 to 20, with the least NLL of probs^(1/T) (Guo et al. 2017); ``probs`` [n, classes], ``labels`` [n].

    With ``prior_scale`` s, the one with the least summed NLL + (log T)²/(2 s²). Raises ``UserError`` unless s is greater than 0.
    """
    from scipy.optimize import minimize_scalar

    probs, labels = _checked(probs, labels)
    if not prior_scale > 0:
        raise UserError(f"prior_scale must be greater than 0, got {prior_scale}; for no prior, leave it out")
    if probs.isnan().any():
        return math.nan
    log = probs.double().clamp_min(torch.finfo(torch.float32).tiny).log()

    def loss(exponent: float) -> float:  # convex in 1/T without a prior
        prior = math.log(exponent) ** 2 / (2 * prior_scale**2) / len(labels)
        return float(F.cross_entropy(log * exponent, labels)) + prior

    return 1 / float(minimize_scalar(loss, bounds=(1 / 20, 20.0), method="bounded", options={"xatol": 1e-6}).x)


def tempered(probs: Tensor, temperature: float) -> Tensor:
    """Probabilities probs^(1/T), normalised, in double precision; ``probs`` is [n, classes]. Raises ``UserError`` unless T is greater than 0."""
    if not temperature > 0:
        raise UserError(f"a temperature must be greater than 0, got {temperature}")
    probs = _probabilities(probs)
    return (probs.double().clamp_min(torch.finfo(torch.float32).tiny).log() / temperature).softmax(-1)


def reliability(probs: Tensor, labels: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """The reliability diagram of ``probs`` [n, classes] and ``labels`` [n] with ``bins`` equal-width confidence bins.

    Returns the mean confidence, the accuracy and the number of examples of each non-empty bin, all [non-empty bins].
    """
    probs, labels = _checked(probs, labels)
    check_counts(1, **{"the number of bins": bins})
    confidence, predicted = probs.double().max(1)
    # float32, as in torchmetrics: 0.7 in float32 lies on an edge, but converted to double below it
    edges = torch.linspace(0, 1, bins + 1, device=probs.device)
    index = (torch.bucketize(confidence.float(), edges, right=True) - 1).clamp_max(bins - 1)
    sums = torch.zeros(2, bins, dtype=torch.double, device=probs.device)
    sums.index_add_(1, index, torch.stack([confidence, (predicted == labels).double()]))
    count = torch.bincount(index, minlength=bins)
    mean, right = sums[:, count > 0] / count[count > 0]
    return mean, right, count[count > 0]


def all_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, NLL, MACE, ECE and Brier score, by name, of ``probs`` [n, classes] and ``labels`` [n]."""
    return {f.__name__: f(probs, labels) for f in (accuracy, nll, mace, ece, brier)}


def doubt(probs: Tensor) -> Tensor:
    """One minus the largest probability [...] of probabilities [..., classes], in double precision.

    It is the sum of the others, since the difference is 0 in single precision where logits are more than 17 apart.
    """
    probs = _probabilities(probs).double()
    return probs.scatter(-1, probs.argmax(-1, keepdim=True), 0.0).sum(-1)


def entropy(probs: Tensor) -> Tensor:
    """The entropy −Σ_c p_c log p_c in nats [...] of probabilities [..., classes], with 0·log 0 = 0."""
    probs = _probabilities(probs)
    return torch.special.entr(probs.double()).sum(-1)


def mutual_information(total: Tensor, aleatoric: Tensor) -> Tensor:
    """The mutual information of label and weights [...] in nats, ``total`` − ``aleatoric`` [...]; 0 if they differ by no more than rounding."""
    found = total - aleatoric
    return torch.where(found <= ROUNDING, torch.zeros_like(found), found)  # NaN stays


def selective(confidence: Tensor, correct: Tensor) -> Tensor:
    """The share of wrong answers [n] among the k most confident ones, for k = 1 to n (selective risk).

    ``confidence`` [n] is any score, and ``correct`` [n] holds 0 or 1. Answers with equal confidence each count with their
    mean. Raises ``UserError`` for other shapes and values.
    """
    confidence = _scores(confidence, "confidence")
    correct = as_real(correct).to(confidence.device)
    if correct.shape != confidence.shape or bool(((correct != 0) & (correct != 1)).any()):
        raise UserError(
            f"correct must be 0 or 1 for each of {len(confidence)} answers, such as probs.argmax(1) == labels, got values of "
            f"shape {tuple(correct.shape)}"
        )
    if confidence.isnan().any():
        return torch.full(confidence.shape, math.nan, dtype=torch.double, device=confidence.device)
    order = confidence.double().argsort(descending=True, stable=True)
    ordered, wrong = confidence.double()[order], 1 - correct.double()[order]
    _, ties, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    share = torch.zeros(len(counts), dtype=torch.double, device=wrong.device).index_add_(0, ties, wrong) / counts
    return share[ties].cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)


def aurc(confidence: Tensor, correct: Tensor) -> float:
    """The area under the risk-coverage curve, the mean of ``selective`` (Geifman et al. 2019); both arguments are [n]."""
    return float(selective(confidence, correct).mean())


def augrc(confidence: Tensor, correct: Tensor) -> float:
    """The area under the generalised risk-coverage curve (Traub et al. 2024), of the wrong answers among the k most confident, per example, for k from 0 to n.

    Both arguments are [n]. It is the chance that an answer is wrong and more confident than a random one, where a tie counts half:
    (1 − a)·acc·(1 − acc) + (1 − acc)²/2 for the AUROC a with which confidence tells right answers from wrong ones.
    """
    risk = selective(confidence, correct)
    wrong = risk * torch.arange(1, len(risk) + 1, device=risk.device) / len(risk)
    return float(wrong.mean() - wrong[-1] / (2 * len(risk)))


def aupr(inside: Tensor, outside: Tensor) -> float:
    """The area under the precision-recall curve of scores ``inside`` [n] and ``outside`` [m], as average precision; ``outside`` is to be detected.

    With negative scores in the other order it is that of ``inside``.
    """
    from torchmetrics.functional.classification import binary_average_precision

    scored = _scored(inside, outside)
    return math.nan if scored is None else float(binary_average_precision(*scored))


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The area under the ROC curve of scores ``inside`` [n] and ``outside`` [m].

    It is the probability that a score of ``outside`` is above a score of ``inside``, where a tie counts half.
    """
    from torchmetrics.functional.classification import binary_auroc

    scored = _scored(inside, outside)
    return math.nan if scored is None else float(binary_auroc(*scored))


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """The false positive rate at 95 % true positives of scores ``inside`` [n] and ``outside`` [m].

    It is the share of ``inside`` above the threshold above which 95 % of ``outside`` lie.
    """
    from torchmetrics.functional.classification import binary_roc

    scored = _scored(inside, outside)
    if scored is None:
        return math.nan
    false_positive, true_positive, _ = binary_roc(*scored)
    return float(false_positive[true_positive >= 0.95][0])


def rmse(mean: Tensor, targets: Tensor) -> float:
    """The root mean square of ``mean`` − ``targets`` over all elements of [n, ...], in the targets' unit."""
    mean, targets = _alike(mean=mean, targets=targets)
    return float((mean - targets).square().mean().sqrt())


def coverage(lower: Tensor, upper: Tensor, targets: Tensor) -> float:
    """The share of elements of ``targets`` in the closed interval from ``lower`` to ``upper``, all [n, ...].

    Raises ``UserError`` if ``lower`` is above ``upper``, or if shapes differ.
    """
    lower, upper, targets = _alike(lower=lower, upper=upper, targets=targets)
    if (lower > upper).any():
        raise UserError("lower is above upper for some targets; call coverage(lower, upper, targets)")
    inside = ((lower <= targets) & (targets <= upper)).double()
    missing = lower.isnan() | upper.isnan() | targets.isnan()
    return float(torch.where(missing, math.nan, inside).mean())


def regression(predictive: Any, targets: Tensor) -> dict[str, float]:
    """RMSE, NLL and coverages, by name, of a predictive of real ``targets`` [n, ...], from ``pl.predictive``.

    RMSE is that of the mean, in the targets' unit. NLL is the mean of −log p(y | x) of whole targets, in nats. The
    coverages are those of the central intervals with ``LEVELS`` percent. Raises ``UserError`` if ``predictive`` is a
    classifier's, or if the shape of ``targets`` is wrong.
    """
    if not hasattr(predictive, "interval"):
        raise UserError(
            "regression needs the result of pl.predictive(...) of a model with real targets; for class probabilities, use "
            "all_metrics(probs, labels)"
        )
    targets = as_real(targets)
    found = {"rmse": rmse(predictive.mean, targets), "nll": -float(predictive.log_prob(targets).double().mean())}
    for level in LEVELS:
        lower, upper = predictive.interval(level / 100)
        found[f"coverage_{level}"] = coverage(lower, upper, targets)
    return found


def _probabilities(probs: Any) -> Tensor:
    """``probs`` as a float tensor [..., classes]; raises ``UserError`` if they are not probabilities, for example logits."""
    probs = as_real(probs)
    if probs.ndim < 2 or not probs.shape[-1] > 1 or not probs.is_floating_point() or not probs.numel():
        raise UserError(
            f"probabilities must be floats [n, classes] with at least one example and two classes, got {tuple(probs.shape)} "
            f"{probs.dtype}"
        )
    rounding = 1e-3 if probs.dtype in (torch.float32, torch.float64) else 2e-2
    if bool((probs < 0).any()) or bool(((probs.double().sum(-1) - 1).abs() > rounding).any()):  # False for NaN
        raise UserError(
            "probabilities must be at least 0 and sum to 1 for each example; convert logits by logits.softmax(1)"
        )
    return probs


def _checked(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Probabilities [n, classes] and int64 labels [n] on the CPU; raises ``UserError`` if either is invalid.

    A GPU would sum bins in any order, with other last bits every time.
    """
    probs = _probabilities(probs).cpu()
    if probs.ndim > 2:
        raise UserError(
            f"probabilities must be [n, classes], got {tuple(probs.shape)}; average the draws by probs.mean(0)"
        )
    labels = as_real(labels).cpu()
    if labels.shape == probs.shape:
        raise UserError(f"labels have shape {tuple(labels.shape)}, like one-hot or probabilities; use labels.argmax(1)")
    if labels.shape != probs.shape[:1]:
        raise UserError(f"labels must have shape ({len(probs)},), one per example, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise UserError(f"labels must be integers from 0 to classes − 1, got {labels.dtype}; use labels.long()")
    labels = labels.long()
    lowest, highest = labels.aminmax()
    if lowest < 0 or highest >= probs.shape[1]:
        odd = int(lowest if lowest < 0 else highest)
        raise UserError(
            f"a label is {odd}, but labels of {probs.shape[1]} classes must be from 0 to {probs.shape[1] - 1}"
        )
    return probs, labels


def _alike(**given: Any) -> list[Tensor]:
    """The given tensors in double precision; raises ``UserError`` if their shapes differ, since they would broadcast."""
    found = {name: as_real(value) for name, value in given.items()}
    first = next(iter(found.values()))
    for name, value in found.items():
        if value.shape != first.shape:
            raise UserError(
                f"{name} must have the shape of {next(iter(found))}, {tuple(first.shape)}, got {tuple(value.shape)}"
            )
    if not first.numel():
        raise UserError("there are no targets to measure; give at least one")
    return [value.to(first.device).double() for value in found.values()]


def _scores(value: Any, name: str) -> Tensor:
    found = as_real(value)
    if found.ndim != 1 or not len(found):
        raise UserError(
            f"{name} must be [n], one score per example, with at least one example, got {tuple(found.shape)}"
        )
    return found


def _scored(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ranks of the scores, scaled to [0, 1], and labels, 1 for outside; None if a score is NaN.

    Torchmetrics treats scores outside [0, 1] as logits, and its sigmoid would merge large ones, so it gets ranks.
    """
    inside, outside = _scores(inside, "inside"), _scores(outside, "outside")
    scores = torch.cat([inside.double(), outside.to(inside.device).double()])
    if scores.isnan().any():
        return None
    ranks = scores.unique(return_inverse=True)[1].double()
    labels = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return ranks / ranks.max().clamp_min(1), labels.to(scores.device)


def deep_ensemble_equivalent(nll: float, of_ensembles: Sequence[float]) -> float:
    """The size of a deep ensemble of the same NLL, between sizes by linear interpolation (Ashukha et al. 2020, who calibrate both first).

    ``of_ensembles`` holds the NLL of ensembles of 1, 2, ... networks. Returns 1 for an ``nll`` that is no better than that of one network, and
    infinity for one that is better than all. Raises ``UserError`` for values that are not finite.
    """
    try:
        given = [float(value) for value in (nll, *of_ensembles)]
    except (TypeError, ValueError):
        given = []
    if len(given) < 2 or not all(map(math.isfinite, given)):
        raise UserError(
            f"deep_ensemble_equivalent needs finite numbers, an NLL and those of ensembles of 1, 2, ... networks, got {nll!r} and {of_ensembles!r}"
        )
    nll, of_ensembles = given[0], given[1:]
    if nll >= of_ensembles[0]:
        return 1.0
    for size, (before, after) in enumerate(pairwise(of_ensembles), start=1):
        if after <= nll < before:
            return size + (before - nll) / (before - after)
    return math.inf


def agreement(probs: Tensor, others: Tensor) -> float:
    """The share of examples to which two predictions [n, classes] give the same class (Izmailov et al. 2021); NaN if one has a NaN."""
    probs, others = _pair(probs, others)
    if bool(probs.isnan().any()) or bool(others.isnan().any()):
        return math.nan
    return float((probs.argmax(1) == others.argmax(1)).double().mean())


def total_variation(probs: Tensor, others: Tensor) -> float:
    """½ Σ |p − q| over classes, averaged over examples, of two predictions [n, classes]: 0 where they are equal, 1 where they exclude each other."""
    probs, others = _pair(probs, others)
    return float((probs - others).abs().sum(1).mean() / 2)


def _pair(probs: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    one, other = (_probabilities(value).cpu() for value in (probs, others))
    if one.ndim != 2 or one.shape != other.shape:
        raise UserError(
            f"two predictions must have one shape [n, classes], got {tuple(one.shape)} and {tuple(other.shape)}"
        )
    return one, other
