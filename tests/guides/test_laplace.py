"""Laplace's approximation."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide as A
from torch import nn

import pyro_lottery as pl


def _regression(temperature):
    """y = Xw + noise, w ~ N(0, 0.7²): the model, its guide at the exact maximum, the data, and the exact covariance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.3]]) + 0.5 * torch.randn(20, 1, generator=generator)
    model = pl.BayesianRegressor(
        nn.Linear(4, 1, bias=False), pl.priors.normal(0.7), num_data=20, noise_scale=0.5, kl_temperature=temperature
    )
    guide = pl.guides.auto(A.AutoLaplaceApproximation, model)

    def exact(kept):
        """Mean and covariance of p(w)·p(D|w)^(1/T) over some weights."""
        precision = x[:, kept].mT @ x[:, kept] / 0.5**2 / temperature + torch.eye(len(kept)) / 0.7**2
        return torch.linalg.solve(precision, x[:, kept].mT @ y / 0.5**2 / temperature).squeeze(1), precision.inverse()

    return model, guide, x, y, exact


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2, 3]])
def test_laplaces_approximation_of_a_gaussian_is_exact(temperature, kept):
    model, guide, x, y, exact = _regression(temperature)
    loc, covariance = exact(kept)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, kept] = True
    with torch.no_grad():
        guide.loc[kept] = loc
    with pl.handlers.sparsify({"weight": mask}):
        found = guide.laplace_approximation(x, y)
        draws = torch.stack([found()["weight"].squeeze(0) for _ in range(3)]).detach()
        assert not draws[:, [n for n in range(4) if n not in kept]].any()
        torch.testing.assert_close(found.get_posterior().marginal.covariance_matrix, covariance, rtol=1e-3, atol=1e-6)
        pl.ELBO().differentiable_loss(model, found, x, y).backward()
    assert found()["weight"].all(), "keeps the mask outside of it"
    posterior = pl.posterior(found)
    assert not pl.guides.is_point(found)
    torch.testing.assert_close(posterior.loc["weight"][mask], loc)
    torch.testing.assert_close(posterior.scale["weight"][mask], covariance.diagonal().sqrt(), rtol=1e-3, atol=0)
    again = pl.guides.auto(A.AutoMultivariateNormal, model)
    pl.guides.set_posterior_(again, posterior)
    assert torch.equal(pl.posterior(again).scale["weight"], posterior.scale["weight"])


def test_laplaces_approximation_uses_batchnorms_running_statistics(tiny_data):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3, affine=False))
    model = pl.BayesianClassifier(net, num_data=60)
    guide = pl.guides.auto(A.AutoLaplaceApproximation, model)
    pl.train(model, guide, tiny_data, epochs=1)
    before, x, y = model.net_state(), tiny_data.train[:20], tiny_data.train.labels[:20]
    scales = []
    for training in (True, False):
        model.train(training)
        scales.append(pl.posterior(guide.laplace_approximation(x, y)).scale["1.weight"])
        assert all(torch.equal(value, before[name]) for name, value in model.net_state().items())
        assert model.training == training
    assert torch.equal(*scales)


def test_a_loc_that_is_no_maximum_has_no_laplace_approximation():
    def model():
        pyro.factor("hill", pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1)).square().sum())

    guide = pl.guides.auto(A.AutoLaplaceApproximation, model)
    with pytest.raises(pl.UserError, match="not positive definite, so loc is not a maximum"):
        guide.laplace_approximation()
