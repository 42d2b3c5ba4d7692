import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import priors
from tests.priors.models import scales
from tests.support import TinyNet


def orthogonal_regression():
    """Inputs whose halves have orthogonal columns each, so that every posterior is mean-field, and targets."""
    halves = [torch.linalg.qr(torch.randn(20, 3))[0] * torch.tensor([8.0, 4.0, 2.0]) for _ in range(2)]
    x = torch.cat(halves)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.5 * torch.randn(40, 1)


def test_the_posterior_of_one_half_as_prior_of_the_other_gives_the_posterior_of_all():
    x, y = orthogonal_regression()
    noise, width = 0.5, 0.7
    model = pl.BayesianRegressor(nn.Linear(3, 1, bias=False), priors.normal(width), num_data=20, noise_scale=noise)
    guide = pl.guides.mean_field(model, init_scale=0.1)
    elbo = pl.ELBO(estimator="local")

    def learn(x, y):
        optimizer = torch.optim.Adam(guide.parameters(), 0.1)
        for step in range(250):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.975**step
            optimizer.zero_grad()
            elbo.differentiable_loss(model, guide, x, y).backward()
            optimizer.step()

    learn(x[:20], y[:20])
    model.set_prior_(priors.from_posterior(pl.posterior(guide)))
    assert pl.ELBO().terms(model, guide, x[20:], y[20:]).tempered_kl.item() == pytest.approx(0, abs=1e-5)
    learn(x[20:], y[20:])
    precision = (x**2).sum(0) / noise**2 + 1 / width**2
    loc = (x.mT @ y).squeeze(1) / noise**2 / precision
    found = pl.posterior(guide)
    exact = precision.rsqrt()
    assert ((found.loc["weight"][0] - loc).abs() < 0.3 * exact).all()
    torch.testing.assert_close(found.scale["weight"][0], exact, rtol=0.05, atol=0)


def test_the_posterior_of_a_pruned_network_is_a_prior(half_mask, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=0.3)
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    with pl.handlers.sparsify(half_mask):
        pruned = pl.masks.apply(half_mask, pl.posterior(guide))
        tiny_model.set_prior_(priors.from_posterior(pruned))
        assert pl.ELBO().terms(tiny_model, guide, *args).tempered_kl.item() == pytest.approx(0, abs=1e-4)
        pl.train(tiny_model, guide, tiny_data, epochs=1, milestones=())
    prior = tiny_model.prior_of("conv.weight")
    kept = half_mask["conv.weight"]
    assert torch.equal(prior.loc, pruned.loc["conv.weight"])
    assert (prior.scale[~kept] == 1).all()
    assert torch.equal(prior.scale[kept], pruned.scale["conv.weight"][kept])
    assert "net.conv.weight_prior.scale" in tiny_model.state_dict()


def test_a_prior_replaced_in_place_is_the_one_that_counts(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    other = pl.BayesianClassifier(TinyNet(), priors.laplace(0.3), num_data=60, kl_temperature=0.1)
    for prior in (priors.normal(0.1, 2.0), {"conv.*": priors.normal(0.5), "*": priors.normal(3.0)}):
        tiny_model.set_prior_(prior)
        other.set_prior_(prior)
        torch.manual_seed(0)
        kl = pl.ELBO().terms(tiny_model, guide, *args).tempered_kl
        torch.manual_seed(0)
        assert kl == pl.ELBO().terms(other, guide, *args).tempered_kl
    before = scales(tiny_model)
    for wrong, message in [
        ({"conv.*": priors.normal(0.5)}, "no glob of the prior matches"),
        ({"out.*": dist.Normal(torch.zeros(7), 1.0), "*": priors.normal(1.0)}, "does not broadcast"),
        (
            priors.from_posterior(pl.Posterior({"a": torch.ones(1)}, {"a": torch.ones(1)}, ())),
            r"has no site 'conv\.weight'",
        ),
    ]:
        with pytest.raises(pl.UserError, match=message):
            tiny_model.set_prior_(wrong)
        assert scales(tiny_model) == before
    with pytest.raises(pl.UserError, match="a point guide's posterior has no scales"):
        priors.from_posterior(pl.posterior(pl.guides.deterministic(tiny_model)))
