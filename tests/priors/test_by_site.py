import pyro.distributions as dist
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import priors
from tests.priors.models import scales
from tests.support import TinyNet


def test_a_prior_may_differ_by_site():
    def prior(site, shape):
        return torch_normal(0.5 if site == "hidden.weight" else 2.0)

    from pyro.distributions import Normal

    def torch_normal(scale):
        return Normal(torch.tensor(0.0), torch.tensor(scale))

    model = pl.BayesianClassifier(TinyNet(), prior, num_data=1)
    assert model.net.hidden.weight_prior().base_dist.scale.unique() == 0.5
    assert model.net.conv.weight_prior().base_dist.scale.unique() == 2.0


def test_a_prior_that_is_no_distribution_is_named():
    for wrong in (
        priors.student_t, priors.flat, dist.Normal, lambda site: dist.Normal(0.0, 1.0), lambda site, shape: None,
        torch.distributions.Normal(0.0, 1.0),
    ):  # fmt: skip
        with pytest.raises(
            pl.UserError, match=r"the prior of 'conv\.weight' .*; a prior must be a pyro\.distributions object"
        ):
            pl.BayesianClassifier(TinyNet(), wrong, num_data=1)


def test_a_dict_of_globs_where_the_first_match_counts():
    prior = {"conv.*": priors.laplace(0.1), "*.weight": dist.Normal(0.0, 2.0), "*": priors.normal(3.0)}
    found = scales(pl.BayesianClassifier(TinyNet(), prior, num_data=1))
    expected = {
        "conv.weight": 0.1, "conv.bias": 0.1, "hidden.weight": 2.0, "hidden.bias": 3.0, "out.weight": 2.0, "out.bias": 3.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_globs_that_do_not_fit_are_named():
    for prior, message in [
        (
            {"*.wieght": priors.normal(1.0), "*": priors.normal(1.0)},
            r"glob '\*\.wieght' matches no site; similar names: .*weight",
        ),
        ({"*.weight": priors.normal(1.0)}, r"no glob of the prior matches site 'conv\.bias'; add '\*'"),
        ({"*": 3}, "a prior must be a pyro.distributions object, or a function .* got 3"),
        (3, "a prior must be a pyro.distributions object, or a function .* got 3"),
        (
            {"*": priors.normal(1.0), "conv.*": priors.laplace(1.0)},
            r"glob 'conv\.\*' is never used, since '\*' comes first",
        ),
        ({}, r"no glob of the prior matches site 'conv\.weight'"),
    ]:
        with pytest.raises(pl.UserError, match=message):
            pl.BayesianClassifier(TinyNet(), prior, num_data=1)
