"""NUTS on posteriors that are known."""

import math

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import masks, metrics
from pyro_lottery.posteriors.nuts import Target, nuts
from tests.support import small_run


def regression(temperature=1.0):
    """A regression on three features of 30 examples with noise 0.5 and prior N(0, 2²); the second weight is pruned."""
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [0.0], [-2.0]]) + 0.5 * torch.randn(30, 1, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.Linear(3, 1, bias=False))
    model = pl.BayesianRegressor(net, pl.priors.normal(2.0), num_data=30, noise_scale=0.5, kl_temperature=temperature)
    data = pl.data.from_tensors(x, y, x, y, normalize=False)
    return (
        model,
        pl.posterior(pl.guides.mean_field(model)),
        {"0.weight": torch.tensor([[True, False, True]])},
        data,
        x,
        y,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_a_conjugate_regression(temperature):
    """Mean and covariance within four standard errors; p(w)·p(D | w)^(1/T) has the precision xᵀx/0.25/T + 1/4."""
    model, posterior, mask, data, x, y = regression(temperature)
    found = nuts(model, posterior, mask, data.train, x, draws=300, warmup=100, chains=2)
    own = x[:, [0, 2]]
    covariance = torch.linalg.inv(own.T @ own / 0.25 / temperature + torch.eye(2) / 4)
    mean = covariance @ own.T @ y[:, 0] / 0.25 / temperature
    draws = found.weights.flatten(0, 1)
    assert draws.shape == (600, 2)
    assert float(found.rhat.max()) < 1.05
    assert float(found.ess.min()) > 200
    error = covariance.diagonal().sqrt() / float(found.ess.min()) ** 0.5
    assert bool(((draws.mean(0) - mean).abs() < 4 * error).all())
    torch.testing.assert_close(
        torch.cov(draws.T), covariance, rtol=0.25, atol=float(covariance.diagonal().min()) * 0.25
    )
    assert found.divergences == 0
    torch.testing.assert_close(found.mean[:, 0], own @ draws.mean(0), rtol=1e-3, atol=1e-4)


def test_a_network_in_double_precision():
    model, posterior, mask, data, *_ = regression()
    wide = pl.BayesianRegressor(
        nn.Sequential(nn.Linear(3, 1, bias=False)).double(), pl.priors.normal(2.0), num_data=30, noise_scale=0.5
    )
    values = torch.tensor([0.3, -1.0])
    found = Target(wide, pl.posterior(pl.guides.mean_field(wide)), mask, data.train)({"w": values.double()})
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(Target(model, posterior, mask, data.train)({"w": values})), rel=1e-5)


def test_the_potential_by_hand():
    """log p(D | w)/T + log p(w) of the surviving weights alone, at two places."""
    model, posterior, mask, data, x, y = regression(0.3)
    target = Target(model, posterior, mask, data.train)
    for values in (torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.1])):
        site = target.values(values)["0.weight"]
        assert site[0, 1] == 0
        prior = pl.priors.normal(2.0)("0.weight", (2,)).log_prob(values).sum()
        fit = torch.distributions.Normal(x @ site.T, 0.5).log_prob(y).sum()
        assert float(target({"w": values})) == pytest.approx(-float(fit / 0.3 + prior), rel=1e-5)


def test_what_cannot_be_sampled_is_one_line(tmp_path):
    model, posterior, mask, data, x, _ = regression()
    with pytest.raises(pl.UserError, match="at least two chains of four draws"):
        nuts(model, posterior, mask, data.train, x, chains=1)
    for wrong, said in ((x[:, :1], "cannot take inputs"), (x[:0], "got none")):
        with pytest.raises(pl.UserError, match=said):
            nuts(model, posterior, mask, data.train, wrong, draws=10**9)
    with pytest.raises(pl.UserError, match="max_tree_depth must be a whole number, at least 1, got 0"):
        nuts(model, posterior, mask, data.train, x, max_tree_depth=0)
    run = small_run(tmp_path / "run", levels=0, guide="deterministic")
    with pytest.raises(pl.UserError, match="has a deterministic guide"):
        pl.nuts(run.level(0))
    run = small_run(tmp_path / "dense", levels=0)
    with pytest.raises(pl.UserError, match="over 21,386 weights would take days"):
        pl.nuts(run.level(0))


def small(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, num_classes))


def test_a_level_of_a_run(tmp_path):
    run = small_run(
        tmp_path / "run", arch="tests.posteriors.test_nuts:small", levels=1, prune_fraction=0.9, train_size=60
    )
    level = run.level(1)
    found = pl.nuts(level, run.load_data().test[:20], draws=4, warmup=4, chains=2, max_tree_depth=3)
    count = masks.remaining(level.mask) + 6 + 60 + 10
    assert found.weights.shape == (2, 4, count)
    assert found.probs.shape == (2, 4, 20, 10)
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(2, 4, 20))
    assert found.rhat.shape == found.ess.shape == (20, 10)
    again = pl.nuts(level, run.load_data().test[:20], draws=4, warmup=4, chains=2, max_tree_depth=3)
    assert torch.equal(again.weights, found.weights)
    whole = pl.nuts(level, run.load_data().test, draws=4, warmup=4, chains=2, max_tree_depth=3)
    assert torch.equal(whole.probs[:, :, :20], found.probs)
    assert 0 <= metrics.total_variation(found.mean, again.mean) < 1e-6


def test_agreement_and_total_variation_by_hand():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]])
    assert metrics.agreement(p, q) == 0.5
    assert metrics.total_variation(p, q) == pytest.approx((0.3 + 1.0) / 2)
    with pytest.raises(pl.UserError, match="must have one shape"):
        metrics.agreement(p, q[:1])
    with pytest.raises(pl.UserError, match="convert logits"):
        metrics.total_variation(p, 3 * q)
    assert math.isnan(metrics.agreement(p, q / 0 * 0))
    assert math.isnan(metrics.total_variation(p, q / 0 * 0))
