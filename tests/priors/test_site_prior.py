import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from tests.support import TinyNet


def test_parameters_of_a_prior_are_in_the_state_dict(tiny_model):
    tiny_model.net.conv.weight_prior.scale.fill_(7.0)
    assert tiny_model.state_dict()["net.conv.weight_prior.scale"] == 7.0


def test_any_distribution_per_weight_will_do():
    # The scale mixture of Bayes by Backprop, a distribution within a distribution, and one that already has the shape.
    from pyro import distributions as dist

    def mixture(site, shape):
        weights = dist.Categorical(torch.tensor([0.25, 0.75]))
        return dist.MixtureSameFamily(weights, dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.0])))

    model = pl.BayesianClassifier(TinyNet(), mixture, num_data=1)
    prior = model.net.hidden.weight_prior
    value = torch.tensor(0.3)
    normal = torch.distributions.Normal(0.0, torch.tensor([0.1, 1.0]))
    expected = (torch.tensor([0.25, 0.75]) * normal.log_prob(value).exp()).sum().log()
    torch.testing.assert_close(prior().log_prob(value.expand(prior.shape)), expected * prior.shape.numel())
    assert {t.dtype for t in model.double().net.hidden.weight_prior.buffers()} == {torch.double}
    assert prior().base_dist.component_distribution.scale.dtype == torch.double

    whole = pl.BayesianClassifier(
        TinyNet(), lambda s, shape: dist.Normal(0.0, 1.0).expand(shape).to_event(), num_data=1
    )
    assert whole.net.conv.weight_prior().event_shape == (4, 1, 3, 3)


def test_a_prior_that_does_not_fit_is_named():
    from pyro import distributions as dist

    for wrong, message in (
        (dist.Normal(torch.zeros(7), 1.0), r"prior of 'conv\.weight' does not broadcast to \(4, 1, 3, 3\)"),
        (dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), "a distribution per weight|does not broadcast"),
    ):
        with pytest.raises(pl.UserError, match=message):
            pl.BayesianClassifier(TinyNet(), lambda s, shape, wrong=wrong: wrong, num_data=1)


def test_tensors_of_a_transformed_prior_are_in_the_state_dict():
    from pyro.distributions.transforms import AffineTransform

    shifted = dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [AffineTransform(torch.tensor(0.5), torch.tensor(2.0))]
    )
    prior = pl.BayesianClassifier(TinyNet(), shifted, num_data=1).net.conv.weight_prior
    found = sorted(float(value) for name, value in prior.state_dict().items())
    assert found == [0.0, 0.5, 1.0, 2.0]
    prior.double()
    assert prior.distribution.transforms[0].loc.dtype == torch.double


ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
REAL = {
    "Normal": dist.Normal(ZERO, ONE),
    "Laplace": dist.Laplace(ZERO, ONE),
    "Cauchy": dist.Cauchy(ZERO, ONE),
    "StudentT": dist.StudentT(torch.tensor(3.0), ZERO, ONE),
    "Gumbel": dist.Gumbel(ZERO, ONE),
    "Gumbel of numbers": dist.Gumbel(0.0, 1.0),
    "Logistic": dist.Logistic(ZERO, ONE),
    "SkewLogistic": dist.SkewLogistic(ZERO, ONE, torch.tensor(2.0)),
    "AsymmetricLaplace": dist.AsymmetricLaplace(ZERO, ONE, torch.tensor(1.5)),
    "Stable": dist.Stable(torch.tensor(1.5), ZERO, ONE, ZERO),
    "StableWithLogProb": dist.StableWithLogProb(torch.tensor(1.5), ZERO, ONE, ZERO),
    "VonMises": dist.VonMises(ZERO, ONE),
    "mixture": dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2))),
    "scaled": dist.TransformedDistribution(dist.Normal(ZERO, ONE), [dist.transforms.AffineTransform(ZERO, 2 * ONE)]),
    "negated": dist.TransformedDistribution(dist.Gumbel(ZERO, ONE), [dist.transforms.AffineTransform(0.0, -1.0)]),
    "masked": dist.Normal(ZERO, ONE).mask(True),
}


@pytest.mark.parametrize("name", REAL)
def test_every_distribution_over_the_reals_is_a_prior(name):
    """Its density is the one it was given, also after a move and a copy, dense and under a mask."""
    prior, x, y = REAL[name], torch.randn(8, 4), torch.randn(8, 2)
    for mask in ({}, {"0.weight": torch.rand(3, 4) < 0.5}):
        model = pl.BayesianRegressor(
            nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), prior, num_data=8, noise_scale=1.0
        )
        guide = pl.guides.mean_field(model, 0.1)
        with pl.handlers.sparsify(mask):
            pl.ELBO().differentiable_loss(model, guide, x, y).backward()
        assert guide.loc.grad.isfinite().all()
        value = torch.full((3, 4), 0.3)
        for each in (model, copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model).double()).float()):
            torch.testing.assert_close(each.prior_of("0.weight").log_prob(value).expand(3, 4), prior.log_prob(value))
