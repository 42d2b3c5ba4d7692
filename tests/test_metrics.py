import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

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
