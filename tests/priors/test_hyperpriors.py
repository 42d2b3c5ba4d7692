import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_lottery as pl
from pyro_lottery import priors, sites
from tests.support import TinyNet


def hyperprior(site, shape):
    """N(m, e^(2l)) with l for all sites and m for each."""
    log_scale = pyro.sample("log_scale", dist.Normal(-1.0, 0.5))
    return dist.Normal(pyro.sample(f"{site}.mean", dist.Normal(0.0, 0.2)), log_scale.exp())


def test_what_a_prior_samples_are_sites_of_the_model(tiny_data):
    model = pl.BayesianClassifier(TinyNet(), hyperprior, num_data=60, kl_temperature=0.1)
    hyper = ("log_scale", *(f"{site}.mean" for site in model.sites))
    assert set(model.hyper_sites) == set(hyper)
    assert model.independent_sites == ()
    trace = poutine.trace(model).get_trace(tiny_data.test[:4], tiny_data.test.labels[:4])
    drawn = [n for n, s in trace.nodes.items() if s["type"] == "sample" and n not in ("data", "y")]
    assert set(drawn) == {*hyper, *model.sites}
    assert {trace.nodes[n]["scale"] for n in drawn} == {0.1}
    value = {n: trace.nodes[n]["value"] for n in drawn}
    density = torch.distributions.Normal(-1.0, 0.5).log_prob(value["log_scale"])
    for site in model.sites:
        mean = value[f"{site}.mean"]
        density = density + torch.distributions.Normal(0.0, 0.2).log_prob(mean)
        density = density + torch.distributions.Normal(mean, value["log_scale"].exp()).log_prob(value[site]).sum()
    torch.testing.assert_close(trace.log_prob_sum(lambda name, site: name in drawn), 0.1 * density)

    mixed = pl.BayesianClassifier(TinyNet(), {"conv.*": hyperprior, "*": priors.normal(1.0)}, num_data=60)
    assert set(mixed.hyper_sites) == {"log_scale", "conv.weight.mean", "conv.bias.mean"}
    assert mixed.independent_sites == ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    with pytest.raises(pl.UserError, match=r"prior of 'conv\.weight' depends on log_scale, conv\.weight\.mean"):
        mixed.prior_of("conv.weight")
    assert sites.describe(mixed, pl.guides.mean_field(mixed))[0]["prior"] == "depends on other sites"
    mixed.set_prior_(priors.normal(1.0))
    assert (mixed.hyper_sites, mixed.independent_sites) == ((), mixed.sites)


def gradients(model, guide, x, y, estimator, sites):
    """Mean and standard error of 200 draws of the loss's gradient by loc and log-scale of sites, as one vector."""
    elbo = pl.ELBO(estimator=estimator)
    found = []
    for _ in range(200):
        loss = elbo.differentiable_loss(model, guide, x, y)
        parts = [guide.unpack(g) for g in torch.autograd.grad(loss, (guide.loc, guide.log_scale))]
        found.append(torch.cat([part[site].flatten() for part in parts for site in sites]))
    every = torch.stack(found)
    return every.mean(0), every.std(0) / len(found) ** 0.5


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_the_gradient_under_a_hyperprior_is_that_of_the_joint_density(estimator):
    """h ~ N(0, τ²), w ~ N(h, s²), y = Xw + noise is one Gaussian of h and w with mean μ and precision Λ: the gradient of
    the ELBO by loc is −Λ(loc − μ), by log scale 1 − Λᵢᵢ·scale².
    """
    x, y = torch.randn(20, 3), torch.randn(20, 1) + 1
    noise, width, hyper_width = 0.8, 0.5, 2.0
    precision = torch.zeros(4, 4)
    precision[0, 0] = 1 / hyper_width**2 + 3 / width**2
    precision[0, 1:] = precision[1:, 0] = -1 / width**2
    precision[1:, 1:] = x.mT @ x / noise**2 + torch.eye(3) / width**2
    mean = torch.linalg.solve(precision, torch.cat([torch.zeros(1, 1), x.mT @ y / noise**2])).squeeze(1)

    def prior(site, shape):
        return dist.Normal(pyro.sample("h", dist.Normal(0.0, hyper_width)), width)

    model = pl.BayesianRegressor(nn.Linear(3, 1, bias=False), prior, num_data=20, noise_scale=noise)
    guide = pl.guides.mean_field(model, init_scale=0.1)
    loc, scale = torch.tensor([1.5, -0.1, 0.4, 0.2]), torch.tensor([0.7, 0.2, 0.1, 0.3])
    at = [{"h": v[0], "weight": v[None, 1:]} for v in (loc, scale)]
    pl.guides.set_posterior_(guide, pl.Posterior(at[0], at[1], ()))
    expected = torch.cat([precision @ (loc - mean), precision.diagonal() * scale**2 - 1])
    found, error = gradients(model, guide, x, y, estimator, ("h", "weight"))
    assert ((found - expected).abs() < 4 * error + 1e-4).all()
    assert (error[[0, 4]] < 0.3 * expected[[0, 4]].abs()).all(), "the test can tell"


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_the_gradient_of_a_positive_hyperprior_is_that_of_its_integral(estimator):
    """w ~ N(0, s²), s half-Cauchy: the expectation over log s ~ N(m, v²) by Gauss-Hermite quadrature."""
    loc, deviation = torch.randn(5, 1) * 0.3, 0.1

    def prior(site, shape):
        return dist.Normal(0.0, pyro.sample("s", dist.HalfCauchy(1.0)))

    model = pl.BayesianRegressor(nn.Linear(1, 5, bias=False), prior, num_data=4, noise_scale=1.0)
    guide = pl.guides.mean_field(model)
    at = {"s": torch.tensor(-1.0), "weight": loc}, {"s": torch.tensor(0.1), "weight": torch.full((5, 1), deviation)}
    pl.guides.set_posterior_(guide, pl.Posterior(*at, ()))
    m, log_v = torch.tensor([-1.0], requires_grad=True), torch.tensor([0.1]).log().requires_grad_()
    points, weights = (torch.tensor(part).float() for part in np.polynomial.hermite_e.hermegauss(40))
    log_s = m + log_v.exp() * points
    density = torch.distributions.HalfCauchy(1.0).log_prob(log_s.exp()) + log_s
    second = (loc**2 + deviation**2).sum()
    density = density - 5 * log_s - second / (2 * (2 * log_s).exp())
    elbo = (density * weights).sum() / weights.sum() + log_v
    expected = -torch.cat(torch.autograd.grad(elbo.sum(), (m, log_v)))
    found, error = gradients(model, guide, torch.randn(4, 1), torch.randn(4, 5), estimator, ("s",))
    assert ((found - expected).abs() < 4 * error).all()
    assert (error < 0.1 * expected.abs().max()).all(), "the test can tell"
    assert (guide()["s"] > 0).all()


def test_pruning_leaves_hyperpriors_alone(tiny_data, half_mask, tmp_path):
    model = pl.BayesianClassifier(TinyNet(), hyperprior, num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model)
    assert set(model.prunable) == set(half_mask)
    start = pl.posterior(guide)
    with pl.handlers.sparsify(half_mask):
        history = pl.train(model, guide, tiny_data, epochs=1, milestones=())
        probs = pl.predict(model, guide, tiny_data.test, num_samples=2)
        pl.predict_mean(model, guide, tiny_data.test)
    assert np.isfinite(history[-1]["loss"])
    torch.testing.assert_close(probs.sum(-1), torch.ones(24))
    assert set(start.loc) == {*model.sites, *model.hyper_sites}
    assert set(pl.masks.full(start)) == set(half_mask)
    pl.Ticket(half_mask, start, model.net_state()).save(tmp_path / "ticket.safetensors")
    model.start_from_(guide, pl.Ticket.load(tmp_path / "ticket.safetensors"))
    assert torch.equal(pl.posterior(guide).loc["log_scale"], start.loc["log_scale"])
    twin = copy.deepcopy(model)
    assert twin.hyper_sites == model.hyper_sites


def test_predictions_under_a_positive_hyperprior(tiny_data, half_mask):
    def prior(site, shape):
        return dist.StudentT(3.0, 0.0, pyro.sample("s", dist.HalfNormal(1.0)))

    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model)
    with pl.handlers.sparsify(half_mask):
        pl.train(model, guide, tiny_data, epochs=2, milestones=())
        state = torch.get_rng_state()
        mean = pl.predict_mean(model, guide, tiny_data.test)
        assert torch.equal(torch.get_rng_state(), state)
        drawn = pl.predict(model, guide, tiny_data.test, num_samples=4)
    torch.testing.assert_close(mean, drawn, rtol=0, atol=0.2)
