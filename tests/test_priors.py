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
