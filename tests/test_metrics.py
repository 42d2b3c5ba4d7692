import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

import pyro_lottery as pl
from pyro_lottery import metrics
from pyro_lottery.model.mixture import Mixture

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


def test_calibration_without_equal_bins():
    """By hand: sorted by confidence, halves of two examples; and the two classes' bins [0.1], [0.4] and [0.6], [0.9]."""
    assert metrics.adaptive_ece(PROBS, LABELS, 2) == pytest.approx((abs(1 - 0.6 - 0.9) + abs(1 - 2 * 0.9)) / 4)
    # class 0: p = .9 thrice (two are), p = .4 (it is); class 1: p = .1 thrice (one is), p = .6 (it is not)
    assert metrics.classwise_ece(PROBS, LABELS) == pytest.approx(
        (abs(2 - 2.7) + abs(1 - 0.4) + abs(1 - 0.3) + 0.6) / 2 / 4
    )


def test_equal_confidences_count_alike_in_any_order():
    """Half of the answers are right, at a confidence of one half, sorted by class as folders are, or not."""
    for labels in ([0, 0, 1, 1], [0, 1, 0, 1]):
        probs = torch.tensor([[0.5, 0.5]]).repeat(4, 1)
        assert metrics.adaptive_ece(probs, torch.tensor(labels), 2) == 0


def test_what_is_left_of_certainty_is_not_rounded_away():
    logits = torch.tensor([[40.0, 0.0, 0.0], [20.0, 0.0, 1.0]])
    doubts = metrics.doubt(logits.softmax(1))
    assert (1 - logits.softmax(1).max(1).values).tolist() == [0, 0]
    assert doubts.tolist() == pytest.approx([2 * math.exp(-40), (1 + math.e) * math.exp(-20)], rel=1e-5)
    assert metrics.doubt(PROBS).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.4])


@pytest.mark.parametrize(("right", "expected"), [(8, 0.0), (5, 0.3), (10, 0.2)])
def test_smooth_ece_of_one_confidence_is_its_distance_to_the_accuracy(right, expected):
    probs = torch.tensor([[0.8, 0.2]]).repeat(1000, 1)
    labels = torch.ones(1000).long()
    labels[: 100 * right] = 0
    assert metrics.smooth_ece(probs, labels) == pytest.approx(expected, abs=1e-3)


def test_a_temperature_undoes_what_sharpened_the_probabilities():
    torch.manual_seed(0)
    true = torch.randn(20_000, 4, dtype=torch.double).mul(1.5).softmax(1)
    labels = torch.distributions.Categorical(true).sample()
    sharp = metrics.tempered(true, 0.4)
    assert metrics.temperature(sharp, labels) == pytest.approx(1 / 0.4, rel=0.03)
    assert metrics.calibrated_nll(sharp, labels) == pytest.approx(metrics.nll(true, labels), abs=1e-3)
    assert metrics.nll(sharp, labels) > metrics.nll(true, labels) + 0.1
    torch.testing.assert_close(metrics.tempered(sharp, 1 / 0.4), true)
    with pytest.raises(pl.UserError, match="temperature must be greater than 0, got 0"):
        metrics.tempered(true, 0)
    with pytest.raises(pl.UserError, match="at least two examples"):
        metrics.calibrated_nll(true[:1], labels[:1])


def test_a_half_without_errors_does_not_fit_a_temperature_of_nothing():
    """One of 360 is wrong at a confidence of .99: without a prior one half fits T < 0.1, and the other pays for it."""
    probs, labels = torch.tensor([[0.99, 0.01]]).repeat(360, 1), torch.zeros(360).long()
    labels[7] = 1
    assert metrics.temperature(probs[8:], labels[8:]) < 0.1
    assert metrics.calibrated_nll(probs, labels) == pytest.approx(metrics.nll(probs, labels), rel=0.1)
    # Of one example the best log T is that where its derivative, of the loss and of the prior, is 0.
    found = metrics.temperature(probs[:1], labels[:1], prior_scale=0.5)
    gap = math.log(0.99 / 0.01) / found
    assert math.log(found) / 0.5**2 == pytest.approx(-gap / (1 + math.exp(gap)), abs=1e-4)


def test_areas_by_hand():
    """Sorted by confidence: right, wrong, right; 0, 0, 1 and 1 of three are wrong and among the none to three most confident."""
    confidence, correct = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 1])
    assert metrics.augrc(confidence, correct) == pytest.approx((0 + 1 / 2 + 1) / 3 / 3)
    assert metrics.aurc(confidence, correct) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    inside, outside = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 5.0])  # precision 1 at recall ½, 2/3 at 1
    assert metrics.aupr(inside, outside) == pytest.approx(1 / 2 + 2 / 3 / 2)
    assert metrics.aupr(-outside, -inside) == pytest.approx(1 / 3 + 1 / 3 + 3 / 4 / 3)  # -1 and -2 come first, then -3


@pytest.mark.parametrize("values", [1000, 7])  # 7: with ties
def test_augrc_is_its_closed_form(values):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(values, (300,), generator=generator).double() / values
    correct = torch.rand(300, generator=generator).double() < 0.3 + confidence / 2
    acc, auroc = float(correct.double().mean()), metrics.auroc(confidence[~correct], confidence[correct])
    assert metrics.augrc(confidence, correct) == pytest.approx((1 - auroc) * acc * (1 - acc) + (1 - acc) ** 2 / 2)
    assert metrics.augrc(torch.ones(1), torch.zeros(1)) == 0.5


def test_new_metrics_of_nan_are_nan():
    broken = PROBS.clone()
    broken[0] = math.nan
    for metric in (
        metrics.smooth_ece,
        metrics.adaptive_ece,
        metrics.classwise_ece,
        metrics.calibrated_nll,
        metrics.temperature,
    ):
        assert math.isnan(metric(broken, LABELS))


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


def test_the_error_of_one_bin_does_not_grow_with_the_examples():
    probs, labels = torch.tensor([[0.8, 0.2]]).expand(400_000, 2), torch.zeros(400_000, dtype=torch.long)
    labels[::5] = 1
    gap = float(probs[0, 0].double() - 0.8)  # of 0.8 in float32
    for error in (metrics.ece, metrics.mace, metrics.adaptive_ece, metrics.classwise_ece):
        assert error(probs, labels) == pytest.approx(gap, abs=1e-8)


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
    found = metrics.accuracy(probs, labels)
    assert found == int((probs.argmax(1) == labels).sum()) / 999
    assert found == pytest.approx(float(multiclass_accuracy(probs, labels, 4, average="micro")), abs=1e-7)


MEASURES = (
    metrics.accuracy, metrics.nll, metrics.brier, metrics.ece, metrics.mace, metrics.all_metrics, metrics.reliability,
)  # fmt: skip
NEITHER = torch.full((4,), 2)


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (PROBS.log(), LABELS, r"at least 0 and sum to 1 for each example; convert logits by logits\.softmax\(1\)"),
        (10 * PROBS, LABELS, "convert logits"),
        (torch.tensor([[3.0, -2.0]] * 4), LABELS, "convert logits"),
        (torch.eye(2)[LABELS] + torch.inf, LABELS, "convert logits"),
        (PROBS[:, :1], LABELS, r"floats \[n, classes\] with at least one example and two classes, got \(4, 1\)"),
        (PROBS[:, 0], LABELS, r"got \(4,\)"),
        (LABELS[:, None].expand(4, 2), LABELS, r"got \(4, 2\) torch.int64"),
        (PROBS[:0], LABELS[:0], r"got \(0, 2\)"),
        (PROBS.expand(3, 4, 2), LABELS, r"\[n, classes\], got \(3, 4, 2\); average the draws by probs\.mean\(0\)"),
        ("probs", LABELS, "tensors or numpy arrays of real numbers, got a str"),
        (
            PROBS,
            torch.eye(2)[LABELS],
            r"labels have shape \(4, 2\), like one-hot or probabilities; use labels\.argmax\(1\)",
        ),
        (PROBS, LABELS[:, None], r"labels must have shape \(4,\), one per example, got \(4, 1\)"),
        (PROBS, LABELS[:3], r"labels must have shape \(4,\), .* got \(3,\)"),
        (PROBS, LABELS.float(), r"labels must be integers .* got torch.float32"),
        (PROBS, NEITHER, "a label is 2, but labels of 2 classes must be from 0 to 1"),
        (PROBS, -LABELS, "a label is -1"),
        (PROBS, None, "got a NoneType"),
    ],
)
@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_no_probability_or_no_label_is_named(measure, probs, labels, message):
    with pytest.raises(pl.UserError, match=message) as raised:
        measure(probs, labels)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool])
def test_labels_of_any_integer_dtype_and_arrays_count_alike(dtype):
    expected = metrics.all_metrics(PROBS, LABELS)
    assert metrics.all_metrics(PROBS, LABELS.to(dtype)) == expected
    assert metrics.all_metrics(PROBS.numpy(), LABELS.to(dtype).numpy()) == expected
    assert metrics.all_metrics(PROBS.numpy(), LABELS.tolist()) == expected
    assert metrics.all_metrics(PROBS.clone().requires_grad_(), LABELS) == expected


def test_columns_and_tables_count_by_their_rows_whatever_their_index():
    labels = pd.Series(LABELS.numpy(), index=[7, 3, 11, 0])
    table = pd.DataFrame(PROBS.numpy(), index=labels.index, columns=["no", "yes"])
    assert metrics.all_metrics(table, labels) == metrics.all_metrics(PROBS, LABELS)
    assert metrics.rmse(PROBS, table) == 0
    with pytest.raises(pl.UserError, match="some are masked"):
        metrics.rmse(PROBS, np.ma.masked_array(PROBS.numpy(), mask=PROBS.numpy() > 0.8))
    backwards = PROBS.numpy()[::-1], LABELS.numpy()[::-1]
    assert metrics.all_metrics(*backwards) == metrics.all_metrics(PROBS.flip(0), LABELS.flip(0))
    predictive = Mixture((dist.Normal(PROBS, 1.0).to_event(1),), PROBS)
    assert metrics.regression(predictive, table + 1) == metrics.regression(predictive, PROBS + 1)
    assert torch.equal(predictive.log_prob(table + 1), predictive.log_prob(PROBS + 1))


def test_probabilities_in_half_precision_are_probabilities():
    torch.manual_seed(0)
    probs, labels = torch.randn(50, 1000).softmax(1), torch.randint(1000, (50,))
    for dtype in (torch.float16, torch.bfloat16):
        assert metrics.nll(probs.to(dtype), labels) == pytest.approx(metrics.nll(probs, labels), rel=0.01)


def test_a_missing_probability_beside_the_labels_is_missing():
    probs = torch.tensor([[0.9, torch.nan], [0.5, 0.5]])
    measured = metrics.all_metrics(probs, torch.tensor([0, 0]))
    assert [name for name, value in measured.items() if not math.isnan(value)] == ["accuracy"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.entropy(PROBS.log()), "convert logits"),
        (lambda: metrics.entropy(PROBS[:, 0]), r"\[n, classes\]"),
        (lambda: pl.prediction.Predictive(10 * PROBS, torch.zeros(4), 1).epistemic, "convert logits"),
        (lambda: metrics.selective(torch.ones(3), LABELS), r"correct must be 0 or 1 for each of 3 answers"),
        (lambda: metrics.aurc(torch.ones(4), NEITHER), r"correct must be 0 or 1 .*argmax"),
        (lambda: metrics.aurc(PROBS, LABELS), r"confidence must be \[n\], .* got \(4, 2\)"),
        (lambda: metrics.aurc(torch.ones(0), LABELS[:0]), r"got \(0,\)"),
        (lambda: metrics.auroc(PROBS, PROBS[:, 0]), r"inside must be \[n\]"),
        (lambda: metrics.fpr95(PROBS[:, 0], PROBS[:0, 0]), r"outside must be \[n\], .* at least one"),
        (lambda: metrics.ece(PROBS, LABELS, 0), "number of bins must be a whole number, at least 1, got 0"),
        (lambda: metrics.mace(PROBS, LABELS, 2.5), "number of bins must be a whole number"),
        (lambda: metrics.calibrated_nll(PROBS, LABELS, 0), "splits must be a whole number, at least 1, got 0"),
        (lambda: metrics.temperature(PROBS, LABELS, 0), "prior_scale must be greater than 0, got 0"),
        (lambda: metrics.temperature(PROBS, LABELS, math.nan), "prior_scale must be greater than 0, got nan"),
        (
            lambda: metrics.deep_ensemble_equivalent((0.9, 0.8), [1.0]),
            r"needs finite numbers, an NLL and .* got \(0\.9, 0\.8\)",
        ),
    ],
)
def test_wrong_scores_are_named(call, message):
    with pytest.raises(pl.UserError, match=message):
        call()


def test_scores_may_be_arrays():
    low, high = np.array([1, 2, 3, 4]), np.array([3.0, 4.5])
    assert metrics.auroc(low, high) == pytest.approx(6.5 / 8)
    assert metrics.aurc(np.array([0.9, 0.8]), np.array([True, False])) == pytest.approx(0.25)
    assert metrics.entropy(np.full((3, 2, 4), 0.25)).shape == (3, 2), "of every draw"


def test_real_predictions_by_hand():
    mean, y = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 4.0]])
    assert metrics.rmse(mean, y) == pytest.approx(math.sqrt((4 + 4 + 16) / 4))
    assert metrics.rmse(mean.numpy(), y.int()) == pytest.approx(math.sqrt(6))
    assert metrics.coverage(y - 1, y, y) == 1, "both bounds count"
    assert metrics.coverage(mean - 2, mean + 2, y) == 0.75
    assert math.isnan(metrics.rmse(mean * math.nan, y))
    assert math.isnan(metrics.coverage(mean - 2, torch.tensor([[math.nan, 3], [3, 3]]), y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.rmse(torch.zeros(4, 1), torch.zeros(4)), r"targets must have the shape of mean, \(4, 1\), got \(4,\)"),
        (lambda: metrics.rmse(torch.zeros(0), torch.zeros(0)), "no targets to measure"),
        (lambda: metrics.coverage(torch.zeros(4), torch.ones(4), torch.zeros(4, 1)), r"targets must have the shape of lower, \(4,\), got \(4, 1\)"),
        (lambda: metrics.coverage(torch.ones(4), torch.zeros(4), torch.zeros(4)), "lower is above upper"),
        (lambda: metrics.regression(PROBS, LABELS), r"for class probabilities, use all_metrics\(probs, labels\)"),
        (lambda: metrics.regression(pl.prediction.Predictive(PROBS, LABELS, 1), LABELS), "all_metrics"),
        (lambda: metrics.regression(Mixture((dist.Normal(torch.zeros(4, 1), 1.0).to_event(1),), torch.zeros(0)), torch.zeros(4)),
         r"targets must have the shape of mean, \(4, 1\), got \(4,\)"),
    ],
)  # fmt: skip
def test_real_predictions_of_other_shapes_are_named(call, message):
    with pytest.raises(pl.UserError, match=message):
        call()


def test_a_perfect_model_covers_what_it_says():
    torch.manual_seed(0)
    mean, scale = torch.randn(2000, 2), torch.tensor([0.5, 3.0])
    y = mean + scale * torch.randn(2000, 2)
    found = metrics.regression(Mixture((dist.Normal(mean, scale).to_event(1),), torch.zeros(0)), y)
    assert list(found) == ["rmse", "nll", "coverage_50", "coverage_80", "coverage_95"]
    assert found["rmse"] == pytest.approx(math.sqrt((0.25 + 9) / 2), rel=0.03)
    assert found["nll"] == pytest.approx(1 + math.log(2 * math.pi) + math.log(0.5 * 3.0), rel=0.02)
    for level in (50, 80, 95):
        assert found[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.02)
