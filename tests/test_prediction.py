import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
    assert torch.equal((every.double().sum(0) / count).float(), average)
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
    for wrong in (2.5, "3", None, True, -1):
        for point in (guide, pl.guides.deterministic(tiny_model)):
            with pytest.raises(pl.UserError, match="num_samples must be a whole number, at least 1"):
                pl.predict(tiny_model, point, tiny_data.test, wrong)
    with pytest.raises(pl.UserError, match="batch_size must be a whole number"):
        pl.predict(tiny_model, guide, tiny_data.test, batch_size=2.5)
    assert pl.predict(tiny_model, guide, tiny_data.test, np.int64(2)).shape == (24, 3)


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


class Labels(pl.BayesianNetwork):
    def likelihood(self, output):
        return dist.Bernoulli(logits=output).to_event(1)


class Counts(pl.BayesianNetwork):
    def likelihood(self, output):
        return dist.Poisson(output[:, 0].exp())


class Heavy(pl.BayesianNetwork):
    def likelihood(self, output):
        return dist.StudentT(5.0, output, 0.5).to_event(1)


class Positive(pl.BayesianNetwork):
    def likelihood(self, output):
        return dist.LogNormal(output, 0.5).to_event(1)


LIKELIHOODS = {
    Labels: lambda out: out.sigmoid(),
    Counts: lambda out: out[:, 0].exp(),
    Heavy: lambda out: out,
    Positive: lambda out: (out + 0.125).exp(),
    lambda net, num_data: pl.BayesianRegressor(net, num_data=num_data, noise_scale="learned"): lambda out: out,
    lambda net, num_data: pl.BayesianRegressor(net, num_data=num_data, noise_scale="predicted"): lambda out: out[:, :1],
}


@pytest.mark.parametrize("make", LIKELIHOODS)
def test_predictions_of_any_likelihood_are_its_means(make):
    model = make(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), num_data=9)
    guide, x = pl.guides.mean_field(model, init_scale=0.3), torch.randn(9, 3)
    torch.manual_seed(5)
    weights = [guide() for _ in range(4)]
    with torch.no_grad():
        outs = []
        for drawn in weights:
            with poutine.condition(data=drawn):
                outs.append(model.outputs(x))
        expected = torch.stack([LIKELIHOODS[make](out) for out in outs])
        likelihoods = [model.likelihood(out) for out in outs]
    torch.manual_seed(5)
    mean = pl.predict(model, guide, x, 4)
    assert not mean.requires_grad
    torch.testing.assert_close(mean, expected.mean(0))
    torch.manual_seed(5)
    torch.testing.assert_close(pl.predict(model, guide, x, 4, aggregate=False), expected)
    torch.manual_seed(5)
    found = pl.predictive(model, guide, x, 4)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.epistemic, expected.std(0, correction=0))
    torch.testing.assert_close(found.aleatoric, torch.stack([each.variance for each in likelihoods]).mean(0).sqrt())
    torch.testing.assert_close(found.total.square(), found.aleatoric.square() + found.epistemic.square())
    y = likelihoods[0].sample()
    each = torch.stack([likelihood.log_prob(y) for likelihood in likelihoods])
    torch.testing.assert_close(found.log_prob(y), each.exp().mean(0).log(), rtol=1e-5, atol=1e-5)
    lower, upper = found.interval(0.9)
    assert lower.shape == upper.shape == y.shape == mean.shape
    assert bool((lower <= upper).all())
    torch.testing.assert_close(pl.predict_mean(model, guide, x), pl.predict(model, pl.guides.deterministic(model), x))


def linear(make, loc, scale):
    """A model of one weight, w ~ N(loc, scale²) under its guide."""
    model = make(nn.Linear(1, 1, bias=False), num_data=3)
    guide = pl.guides.mean_field(model)
    sites = {"weight": torch.tensor([[loc]])}
    pl.guides.set_posterior_(guide, pl.Posterior(sites, {"weight": torch.tensor([[scale]])}, ()))
    return model, guide


def gaussian_mean(f, loc, scale):
    """E[f(w)], w ~ N(loc, scale²), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return sum(w * f(loc + scale * torch.tensor(t)) for t, w in zip(nodes, weights / weights.sum(), strict=True))


def test_a_poisson_likelihood_meets_its_closed_forms():
    loc, scale, x, y = 0.4, 0.3, torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([2, 0, 3])
    model, guide = linear(Counts, loc, scale)
    mean = (x[:, 0] * loc + (x[:, 0] * scale) ** 2 / 2).exp()  # of exp(xw)
    expected = (y * x[:, 0] * loc - mean - (y + 1.0).lgamma()).sum()
    with torch.no_grad():
        found = torch.stack([-pl.ELBO().terms(model, guide, x, y).nll for _ in range(600)])
    assert abs(found.mean() - expected) < 4 * found.std() / 600**0.5 < 0.3
    each = pl.predict(model, guide, x, 600, aggregate=False)
    assert bool(((each.mean(0) - mean).abs() < 4 * each.std(0) / 600**0.5).all())
    density = gaussian_mean(lambda w: torch.distributions.Poisson((x[:, 0] * w).exp()).log_prob(y).exp(), loc, scale)
    torch.testing.assert_close(
        pl.predictive(model, guide, x, 600).log_prob(y), density.log().float(), rtol=0, atol=0.05
    )


def test_a_bernoulli_likelihood_meets_its_closed_forms():
    loc, scale, x, y = 0.4, 2.0, torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([[True], [False], [False]])
    model, guide = linear(Labels, loc, scale)
    probs = gaussian_mean(lambda w: (x * w).sigmoid(), loc, scale).float()
    expected = gaussian_mean(
        lambda w: torch.distributions.Bernoulli(logits=x * w).log_prob(y.float()).sum(), loc, scale
    )
    with torch.no_grad():
        found = torch.stack([-pl.ELBO().terms(model, guide, x, y).nll for _ in range(600)])
    assert abs(found.mean() - expected) < 4 * found.std() / 600**0.5 < 0.5
    predictive = pl.predictive(model, guide, x, 600)
    torch.testing.assert_close(predictive.mean, probs, rtol=0, atol=0.05)
    torch.testing.assert_close(predictive.log_prob(y).exp(), torch.where(y, probs, 1 - probs)[:, 0], rtol=0, atol=0.05)
    torch.testing.assert_close(predictive.total.square(), predictive.mean * (1 - predictive.mean))


def test_a_predictive_keeps_its_noise_while_the_model_trains_on():
    model = pl.BayesianRegressor(nn.Linear(3, 2), num_data=9, noise_scale=nn.Parameter(torch.ones(2)))
    found = pl.predictive(model, pl.guides.mean_field(model), torch.randn(4, 3), 2)
    with torch.no_grad():
        model.noise_scale.fill_(5.0)
    assert found.aleatoric.tolist() == [[1.0, 1.0]] * 4


def test_a_classifiers_predictive_is_the_last_of_all():
    model = pl.BayesianClassifier(nn.Linear(3, 4), num_data=9)
    guide, x = pl.guides.mean_field(model, init_scale=1.0), torch.randn(9, 3)
    torch.manual_seed(2)
    expected = list(prediction.predictives(model, guide, x, 5))[-1]
    for given in (x, DataLoader(TensorDataset(x, torch.zeros(9)), batch_size=4)):
        torch.manual_seed(2)
        found = pl.predictive(model, guide, given, 5)
        assert found.num_samples == 5
        torch.testing.assert_close(found.probs, expected.probs)
        torch.testing.assert_close(found.aleatoric, expected.aleatoric)
    with pytest.raises(pl.UserError, match=r"use pl\.predictive"):
        next(prediction.predictives(model, guide, DataLoader(x), 5))
    regressor = pl.BayesianRegressor(nn.Linear(3, 4), num_data=9, noise_scale=1.0)
    with pytest.raises(pl.UserError, match=r"use pl\.predictive"):
        next(prediction.predictives(regressor, pl.guides.mean_field(regressor), x, 5))


class Loud:
    """Batches that are counted, and that use torch's random numbers as a loader with augmentation does."""

    def __init__(self, x, size):
        self.x, self.size, self.reads = x, size, 0

    def __iter__(self):
        self.reads += 1
        torch.rand(3)
        for part in self.x.split(self.size):
            torch.rand(5)
            yield part, torch.zeros(len(part))


@pytest.mark.parametrize("aggregate", [True, False])
def test_a_loader_is_read_once_under_the_draws_of_a_tensor(aggregate, tiny_model, tiny_data):
    guide, x = pl.guides.mean_field(tiny_model, init_scale=1.0), tiny_data.test[:]
    loader = Loud(x, 7)
    torch.manual_seed(3)
    whole = pl.predict(tiny_model, guide, x, 4, batch_size=7, aggregate=aggregate)
    after = torch.rand(2)
    torch.manual_seed(3)
    found = pl.predict(tiny_model, guide, loader, 4, aggregate=aggregate)
    assert torch.equal(found, whole)
    assert torch.equal(torch.rand(2), after), "the next draws are others"
    assert loader.reads == 1
    mean = pl.predict_mean(tiny_model, guide, x, batch_size=7)
    assert torch.equal(pl.predict_mean(tiny_model, guide, loader), mean)
    workers = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=7)
    torch.manual_seed(3)
    assert torch.equal(pl.predict(tiny_model, guide, workers, 4, aggregate=aggregate), whole)


def test_every_draw_is_used_for_all_batches_of_a_network_that_draws_numbers_itself():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(1, 1, bias=False)

        def forward(self, x):
            torch.rand(len(x))
            return self.out(x)

    model = pl.BayesianRegressor(Noisy(), num_data=9, noise_scale=1.0)
    guide = pl.guides.mean_field(model, init_scale=1.0)
    batches = iter([torch.ones(2, 1), torch.ones(3, 1), torch.ones(1, 1)])
    found = pl.predict(model, guide, batches, 3, aggregate=False)
    assert found.shape == (3, 6, 1)
    assert torch.equal(found, found[:, :1].expand(3, 6, 1))
    assert len(set(found[:, 0, 0].tolist())) == 3


def test_several_inputs_are_predicted_in_slices_and_from_a_loader():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 1), nn.Linear(2, 1)

        def forward(self, a, b):
            return self.left(a) + self.right(b)

    model = pl.BayesianRegressor(Two(), num_data=9, noise_scale=1.0)
    guide = pl.guides.deterministic(model)
    a, b = torch.randn(9, 3), torch.randn(9, 2)
    whole = pl.predict(model, guide, (a, b))
    assert whole.shape == (9, 1)
    loader = DataLoader([({"a": u, "b": v}, 0.0) for u, v in zip(a, b, strict=True)], batch_size=4)
    for x in ([a, b], {"b": b, "a": a}, (a.double().numpy(), b.numpy()), loader):
        torch.testing.assert_close(pl.predict(model, guide, x, batch_size=4), whole)


def test_what_was_not_normalised_is_named(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    with pytest.raises(pl.UserError, match=r"cannot take .* uint8 inputs .* pass a split, such as data\.test"):
        pl.predict(tiny_model, guide, tiny_data.test.inputs)
    whole = pl.predict_mean(tiny_model, guide, tiny_data.test)
    for x in (
        tiny_data.test[:],
        tiny_data.test[:].double(),
        tiny_data.test[:].numpy(),
        tiny_data.test[:].double().numpy(),
    ):
        torch.testing.assert_close(pl.predict_mean(tiny_model, guide, x), whole)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4, 3).long(), r"cannot take \[4, 3\] int64 inputs \(.*\); pass a split, such as data\.test"),
        (torch.ones(4, 2), r"cannot take \[4, 2\] float32 inputs \(mat1 and mat2 .*\)$"),
        ([torch.ones(4, 3)] * 2, r"cannot take \[4, 3\] float32, \[4, 3\] float32 inputs \(.* 3 were given\)$"),
        ({"a": torch.ones(4, 3)}, r"cannot take \[4, 3\] float32 inputs \(.* keyword argument 'a'\)$"),
        (torch.ones(4, 3).to_sparse(), r"inputs must be dense, got a tensor of the layout torch.sparse_coo"),
        (np.ma.masked_array(np.ones((4, 3)), np.eye(4, 3) > 0), "masked entries; fill them, or leave"),
        (np.ones((4, 3), dtype=">f4"), "numpy type >f4 cannot be read; use x.astype"),
    ],
)
def test_inputs_that_the_network_cannot_take_are_named(x, message):
    model = pl.BayesianRegressor(nn.Linear(3, 2), num_data=4, noise_scale=1.0)
    for predict in (pl.predict, pl.predictive, pl.predict_mean):
        with pytest.raises(pl.UserError, match=message):
            predict(model, pl.guides.mean_field(model), x)


class OneForAll(pl.BayesianNetwork):
    def likelihood(self, output):
        return dist.Normal(output.mean(), 1.0)


class NoDistribution(pl.BayesianNetwork):
    def likelihood(self, output):
        return output


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OneForAll, r"has the batch shape \(\) for 4 examples"),
        (NoDistribution, "must return a distribution from pyro.distributions, got a Tensor"),
        (pl.BayesianNetwork, r"BayesianNetwork has no likelihood; define a method likelihood\(self, output\)"),
    ],
)
def test_likelihoods_that_are_none_are_named(kind, message):
    model = kind(nn.Linear(3, 2), num_data=4)
    guide = pl.guides.mean_field(model)
    for predict in (pl.predict, pl.predictive, pl.predict_mean, model.forward):
        with pytest.raises(pl.UserError, match=message):
            predict(*(() if predict == model.forward else (model, guide)), torch.ones(4, 3))


class Squeezed(nn.Module):
    """Which loses the examples' dimension where there is one example."""

    def __init__(self, outputs):
        super().__init__()
        self.linear = nn.Linear(3, outputs)

    def forward(self, x):
        return self.linear(x).squeeze()


@pytest.mark.parametrize(("outputs", "shape"), [(1, r"\(\)"), (2, r"\(2,\)")])
def test_outputs_that_lose_the_examples_dimension_are_named(outputs, shape):
    model = pl.BayesianRegressor(Squeezed(outputs), num_data=4, noise_scale=1.0)
    guide, x = pl.guides.mean_field(model), torch.randn(5, 3)
    assert len(pl.predict(model, guide, x)) == 5
    for predict in (pl.predict, pl.predictive, pl.predict_mean):
        for inputs, options in ((x[:1], {}), (x, {"batch_size": 4})):
            with pytest.raises(pl.UserError, match=rf"the network returned shape {shape} for 1 example.* squeeze\(\)"):
                predict(model, guide, inputs, **options)
    data = pl.data.from_tensors(x, torch.randn(5, 1).expand(5, outputs).squeeze(1), x[:1], x[:1, :outputs].squeeze(1))
    model.num_data = 5
    with pytest.raises(pl.UserError, match="squeeze"):
        pl.train(model, guide, data, epochs=1)


@pytest.mark.slow
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


def test_equal_draws_have_no_epistemic_entropy():
    """Rounding alone would order the images, and detect some of them."""
    probs = torch.rand(200, 10, generator=torch.Generator().manual_seed(0)).softmax(1)
    found = prediction.last(prediction._running(iter([probs] * 10)))
    assert (found.total - found.aleatoric).abs().max() > 0
    assert found.epistemic.unique().tolist() == [0.0]


def test_nan_is_no_certainty():
    probs = torch.full((2, 3), torch.nan)
    assert prediction.Predictive(probs, probs[:, 0], 2).epistemic.isnan().all()


def test_a_thousand_draws_cost_no_digits():
    model = pl.BayesianClassifier(nn.Linear(3, 10), num_data=9)
    guide, x = pl.guides.mean_field(model, init_scale=1e-7), 2 * torch.randn(50, 3)
    expected, found = pl.predict_mean(model, guide, x), pl.predictive(model, guide, x, 1000)
    for probs in (found.probs, pl.predict(model, guide, x, 1000)):
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs, expected, rtol=0, atol=3e-7)
        torch.testing.assert_close(probs.double().sum(1), torch.ones(50).double(), rtol=0, atol=3e-7)
    assert found.epistemic.unique().tolist() == [0.0]
