import subprocess
import sys

import pytest
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal

import pyro_lottery as pl
from pyro_lottery import prediction


@pytest.mark.parametrize("training", [True, False])
def test_predicting_changes_nothing(training, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    tiny_model.train(training)
    buffers = {n: b.clone() for n, b in tiny_model.named_buffers()}
    probs = pl.predict(tiny_model, guide, tiny_data.test, 3)
    pl.predict_mean(tiny_model, guide, tiny_data.test)
    assert all(torch.equal(b, buffers[n]) for n, b in tiny_model.named_buffers())
    assert tiny_model.training is training
    assert not probs.requires_grad
    torch.testing.assert_close(probs.sum(1), torch.ones(24))


def test_averages_the_softmax_of_one_draw_for_all_images(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=1.0)
    images = tiny_data.test[:]
    torch.manual_seed(7)
    probs = pl.predict(tiny_model, guide, images, 4, batch_size=5)
    torch.manual_seed(7)
    expected = 0
    tiny_model.eval()
    for _ in range(4):
        weights = guide()
        with torch.no_grad(), prediction.poutine.condition(data=weights):
            expected = expected + tiny_model.net(images).softmax(1) / 4
    torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize("point", [False, True])
def test_unaggregated_predictions_are_those_that_the_average_is_of(point, tiny_model, tiny_data, half_mask):
    guide = (pl.guides.deterministic if point else pl.guides.mean_field)(tiny_model)
    with pl.handlers.sparsify(half_mask):
        torch.manual_seed(3)
        every = pl.predict(tiny_model, guide, tiny_data.test, num_samples=4, aggregate=False)
        torch.manual_seed(3)
        average = pl.predict(tiny_model, guide, tiny_data.test, num_samples=4)
    count = 1 if point else 4
    assert every.shape == (count, 24, 3)
    assert torch.equal(sum(every) / count, average)
    torch.testing.assert_close(every.mean(0), average)
    assert point or not torch.equal(every[0], every[1])


def test_splits_and_tensors_and_batch_sizes_agree(tiny_model, tiny_data):
    guide = pl.guides.deterministic(tiny_model)
    whole = pl.predict(tiny_model, guide, tiny_data.test[:])
    torch.testing.assert_close(pl.predict(tiny_model, guide, tiny_data.test, batch_size=7), whole)


def test_mean_weights_are_the_limit_of_a_vanishing_scale(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=1e-7)
    mean = pl.predict_mean(tiny_model, guide, tiny_data.test)
    torch.testing.assert_close(pl.predict(tiny_model, guide, tiny_data.test, 2), mean, rtol=0, atol=1e-5)


def test_mean_weights_are_pruned(tiny_model, tiny_data, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    with pl.handlers.sparsify(half_mask):
        pruned = pl.predict_mean(tiny_model, guide, tiny_data.test)
    pl.guides.zero_pruned_(guide, half_mask)
    assert torch.equal(pruned, pl.predict_mean(tiny_model, guide, tiny_data.test))


def test_a_point_guide_needs_one_pass(tiny_model, tiny_data):
    calls = []
    tiny_model.net.register_forward_hook(lambda *a: calls.append(1))
    pl.predict(tiny_model, pl.guides.deterministic(tiny_model), tiny_data.test, 10)
    assert len(calls) == 1


def test_bad_numbers_are_named(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    with pytest.raises(pl.UserError, match="predict_mean"):
        pl.predict(tiny_model, guide, tiny_data.test, 0)
    with pytest.raises(pl.UserError, match="unknown precision"):
        pl.predict(tiny_model, guide, tiny_data.test, precision="16")


def test_joint_guides_predict_from_mean_weights_under_a_mask(tiny_model, tiny_data, half_mask):
    guide = pl.guides.auto(AutoLowRankMultivariateNormal, tiny_model)
    with pl.handlers.sparsify(half_mask):
        pruned = pl.predict_mean(tiny_model, guide, tiny_data.test)
        assert pl.posterior(guide).scale["conv.weight"].shape == (4, 1, 3, 3)
    pl.guides.zero_pruned_(guide, half_mask)
    torch.testing.assert_close(pruned, pl.predict_mean(tiny_model, guide, tiny_data.test))


def test_frozen_modules_stay_frozen(tiny_model, tiny_data):
    tiny_model.train()
    tiny_model.net.bn.eval()
    pl.predict(tiny_model, pl.guides.mean_field(tiny_model), tiny_data.test, 1)
    assert tiny_model.net.hidden.training
    assert not tiny_model.net.bn.training


def test_a_regressor_has_no_class_probabilities(tiny_data):
    from tests.conftest import TinyNet

    model = pl.BayesianRegressor(TinyNet(), num_data=1, noise_scale=1.0)
    guide = pl.guides.mean_field(model)
    for predict in (pl.predict, pl.predict_mean):
        with pytest.raises(pl.UserError, match="has no class probabilities"):
            predict(model, guide, tiny_data.test)


def test_peak_memory_does_not_grow_with_the_samples():
    code = (
        "import resource, torch, pyro_lottery as pl\n"
        "model = pl.BayesianClassifier(pl.create_model('resnet20', num_classes=10), num_data=100)\n"
        "guide, images = pl.guides.mean_field(model), torch.randn(16, 3, 32, 32)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pl.predict(model, guide, images, 2); before = peak()\n"
        "pl.predict(model, guide, images, 100); print(peak() / before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.05


def test_total_entropy_is_aleatoric_plus_epistemic(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=1.0)
    torch.manual_seed(3)
    found = list(prediction.predictives(tiny_model, guide, tiny_data.test, 5))
    torch.manual_seed(3)
    each = [pl.predict(tiny_model, guide, tiny_data.test, 1).double() for _ in range(5)]
    last = found[-1]
    assert [p.num_samples for p in found] == [1, 2, 3, 4, 5]
    entropies = torch.stack([-(p * p.log()).sum(1) for p in each])
    mean = torch.stack(each).mean(0)
    torch.testing.assert_close(last.aleatoric, entropies.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.total, -(mean * mean.log()).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.aleatoric + last.epistemic, last.total)
    assert (last.epistemic >= -1e-6).all(), "mutual information"
    assert found[0].epistemic.abs().max() < 1e-6, "one draw knows no doubt of its own"


def test_entropies_of_hand_made_predictives():
    certain_but_opposed = prediction.Predictive(torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), 2)
    assert float(certain_but_opposed.epistemic) == pytest.approx(float(torch.tensor(2.0).log()))
    agreed = prediction.Predictive(torch.tensor([[0.5, 0.5]]), torch.tensor([2.0]).log(), 2)
    assert float(agreed.epistemic) == pytest.approx(0.0, abs=1e-7)
