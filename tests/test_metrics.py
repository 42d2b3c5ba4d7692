import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from pyro_lottery import metrics

# Three examples of confidence 0.9 (two right), one of 0.6 (wrong): bins [0.9, 0.95) and [0.6, 0.65).
PROBS = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.double)
LABELS = torch.tensor([0, 0, 1, 0])


def test_closed_forms():
    gap_high, gap_low = abs(2 / 3 - 0.9), abs(0 - 0.6)
    assert metrics.accuracy(PROBS, LABELS) == pytest.approx(0.5)
    assert metrics.mace(PROBS, LABELS) == pytest.approx((gap_high + gap_low) / 2)
    assert metrics.ece(PROBS, LABELS) == pytest.approx(0.75 * gap_high + 0.25 * gap_low)
    assert metrics.nll(PROBS, LABELS) == pytest.approx(-(2 * math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4)
    assert metrics.brier(PROBS, LABELS) == pytest.approx((2 * 0.02 + 1.62 + 0.72) / 4)


def test_mace_counts_only_bins_that_hold_something():
    perfect = torch.eye(3)[torch.arange(9) % 3]
    assert metrics.mace(perfect, torch.arange(9) % 3) == 0
    assert metrics.mace(perfect, (torch.arange(9) + 1) % 3) == 1
    assert metrics.ece(perfect, (torch.arange(9) + 1) % 3) == pytest.approx(1)


def test_confidences_on_an_edge_are_binned_alike():
    edges = torch.tensor([0.65, 0.7, 0.9, 0.95])
    probs = torch.stack([edges, 1 - edges], 1)
    labels = torch.tensor([0, 0, 0, 0])
    confidence, right, count = metrics.reliability(
        torch.cat([probs, probs + torch.tensor([0.02, -0.02])]), labels.repeat(2)
    )
    assert count.tolist() == [2, 2, 2, 2], "0.7 and 0.72 are in one bin"
    assert right.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(confidence, edges.double() + 0.01)


def test_a_confidence_of_one_shares_the_last_bin():
    probs = torch.tensor([[1.0, 0.0], [0.96, 0.04]])
    assert metrics.mace(probs, torch.tensor([1, 0])) == pytest.approx(abs(0.5 - 0.98))
    assert metrics.ece(probs, torch.tensor([1, 0])) == pytest.approx(abs(0.5 - 0.98))


def test_mace_and_ece_agree_with_torchmetrics_bin_by_bin():
    torch.manual_seed(0)
    probs, labels = torch.randn(5000, 4, dtype=torch.double).mul(2).softmax(1), torch.randint(4, (5000,))
    assert metrics.ece(probs, labels) == pytest.approx(
        float(multiclass_calibration_error(probs, labels, 4, n_bins=20)), abs=1e-6
    )
    confidence, predicted = probs.max(1)
    gaps = [
        abs((predicted[s] == labels[s]).double().mean() - confidence[s].mean())
        for b in range(20)
        if (s := (confidence >= b / 20) & (confidence < (b + 1) / 20)).any()
    ]
    assert metrics.mace(probs, labels) == pytest.approx(float(sum(gaps) / len(gaps)))


def test_an_impossible_label_costs_a_finite_nll():
    assert 80 < metrics.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) < 90


def test_entropy_by_hand():
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert metrics.entropy(probs).tolist() == pytest.approx([math.log(2), 0.0, math.log(3)])


def test_risk_and_coverage_by_hand():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6])
    correct = torch.tensor([True, False, True, False])
    assert metrics.selective(confidence, correct).tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert metrics.aurc(confidence, correct) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert metrics.aurc(confidence, torch.ones(4)) == 0
    tied = torch.tensor([0.5, 0.5])  # neither comes first, so that the order of the images does not matter
    assert metrics.selective(tied, torch.tensor([True, False])).tolist() == [0.5, 0.5]


def test_told_apart_by_made_up_scores():
    low, high = torch.tensor([0.1, 0.2, 0.3, 5.0]), torch.tensor([10.0, 20.0, 30.0])
    assert (metrics.auroc(low, high), metrics.fpr95(low, high)) == (1.0, 0.0)
    assert metrics.auroc(high, low) == 0.0
    assert metrics.auroc(low, low) == 0.5
    assert metrics.fpr95(low, low) == 1.0
    # of 4 × 2 pairs 5 are in order and one is tied: 5.5 / 8
    assert metrics.auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(6.5 / 8)
    # all of the outside lie above 2.9, and so do two of four inside
    assert metrics.fpr95(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.9, 4.5])) == 0.5


def test_examples_that_are_not_numbers_are_wrong_and_make_every_other_measure_nan():
    probs = PROBS.repeat(2, 1)
    probs[0], probs[1, 1] = torch.nan, torch.nan
    labels = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0])
    assert metrics.accuracy(probs, labels) == 2 / 8  # of the second four, two are right
    assert (
        metrics.accuracy(probs, torch.ones(8).long()) == 2 / 8
    )  # the largest of NaNs is no class, whatever argmax says
    measured = metrics.all_metrics(probs, labels)
    assert [name for name, value in measured.items() if not math.isnan(value)] == ["accuracy"]
    assert metrics.entropy(probs).isnan().tolist() == [True, True] + [False] * 6
    confidence = torch.tensor([0.9, torch.nan])
    assert math.isnan(metrics.aurc(confidence, torch.ones(2)))
    for measure in (metrics.auroc, metrics.fpr95):
        assert math.isnan(measure(confidence, torch.zeros(2)))
        assert math.isnan(measure(torch.zeros(2), confidence))


def test_infinite_scores_are_ranked():
    assert metrics.auroc(torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, 0.5])) == 0.75
    assert metrics.auroc(torch.tensor([-torch.inf, 1.0]), torch.tensor([2.0, torch.inf])) == 1


def test_accuracy_agrees_with_torchmetrics():
    torch.manual_seed(0)
    probs, labels = torch.randn(999, 4).softmax(1), torch.randint(4, (999,))
    assert metrics.accuracy(probs, labels) == float(multiclass_accuracy(probs, labels, 4, average="micro"))
