import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import priors


def test_one_number_is_the_scale_and_two_are_loc_and_scale():
    for make in (priors.normal, priors.laplace):
        one, two = make(2.0)("w", torch.Size([1])), make(0.5, 2.0)("w", torch.Size([1]))
        assert (one.loc, one.scale, two.loc, two.scale) == (0.0, 2.0, 0.5, 2.0)
    assert priors.student_t(2.0, df=5.0)("w", torch.Size([1])).df == 5.0


def test_a_prior_may_differ_by_site():
    def prior(site, shape):
        return torch_normal(0.5 if site == "hidden.weight" else 2.0)

    from pyro.distributions import Normal

    from tests.conftest import TinyNet

    def torch_normal(scale):
        return Normal(torch.tensor(0.0), torch.tensor(scale))

    model = pl.BayesianClassifier(TinyNet(), prior, num_data=1)
    assert model.net.hidden.weight_prior().base_dist.scale.unique() == 0.5
    assert model.net.conv.weight_prior().base_dist.scale.unique() == 2.0


def test_parameters_of_a_prior_are_in_the_state_dict(tiny_model):
    tiny_model.net.conv.weight_prior.scale.fill_(7.0)
    assert tiny_model.state_dict()["net.conv.weight_prior.scale"] == 7.0


def test_by_name():
    assert priors.by_name("laplace", 0.5)("w", torch.Size([1])).scale == 0.5
    assert priors.by_name("pyro_lottery.priors.flat", 1.0) is priors.flat
    with pytest.raises(pl.UserError, match="did you mean laplace"):
        priors.by_name("laplac", 1.0)
    with pytest.raises(pl.UserError, match="greater than 0"):
        priors.by_name("normal", 0.0)


def test_a_flat_prior_has_density_one_and_cannot_be_sampled():
    flat = priors.Flat().expand(torch.Size([2, 3])).to_event(2)
    assert flat.log_prob(torch.randn(2, 3)) == 0
    with pytest.raises(pl.UserError, match="flat prior"):
        flat.sample()


def test_any_distribution_per_weight_will_do():
    # The scale mixture of Bayes by Backprop, a distribution within a distribution, and one that already has the shape.
    from pyro import distributions as dist

    from tests.conftest import TinyNet

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

    from tests.conftest import TinyNet

    for wrong, message in (
        (dist.Normal(torch.zeros(7), 1.0), r"prior of 'conv\.weight' does not broadcast to \(4, 1, 3, 3\)"),
        (dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), "a distribution per weight|does not broadcast"),
    ):
        with pytest.raises(pl.UserError, match=message):
            pl.BayesianClassifier(TinyNet(), lambda s, shape, wrong=wrong: wrong, num_data=1)
