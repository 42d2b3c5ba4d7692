"""Guides from names, classes and functions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide as A
from torch import nn

import pyro_lottery as pl
from pyro_lottery import guides
from tests.guides.models import loop, subsampled


def test_unknown_guides_are_named():
    with pytest.raises(pl.UserError, match="did you mean mean_field"):
        guides.check_name("meanfield")
    with pytest.raises(pl.UserError, match=r"--guide pyro\.no\.Such"):
        guides.check_name("pyro.no.Such")


def test_any_pyro_model_that_shows_its_sites():
    class Model(nn.Module):
        def forward(self, x):

            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=x[:, 0])

    guide = pl.guides.mean_field(Model(), 0.1, torch.ones(3, 2))
    assert guide(torch.ones(5, 2))["w"].shape == (2,)


def test_options_of_a_guide(tiny_model):
    assert pl.guides.auto(A.AutoLowRankMultivariateNormal, tiny_model, rank=3).cov_factor.shape[1] == 3
    with pytest.raises(pl.UserError, match="unknown option of AutoLowRankMultivariateNormal 'rang': did you mean rank"):
        pl.guides.auto(A.AutoLowRankMultivariateNormal, tiny_model, rang=3)
    with pytest.raises(pl.UserError, match=r"takes a class of pyro\.infer\.autoguide"):
        pl.guides.auto(lambda model: A.AutoNormal(model), tiny_model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (A.AutoNormalMessenger, "AutoNormalMessenger is a messenger guide"),
        (A.AutoHierarchicalNormalMessenger, "is a messenger guide"),
        (A.AutoRegressiveMessenger, "is a messenger guide"),
        (A.AutoGaussian, "use AutoMultivariateNormal"),
        (A.AutoCallable, "wraps a guide of your own"),
        (A.AutoDiscreteParallel, "is for discrete sites"),
        (A.AutoContinuous, "is what other guides are made from"),
    ],
)
def test_kinds_that_cannot_be_adapted_say_why(kind, message, tiny_model):
    with pytest.raises(pl.UserError, match=message):
        pl.guides.auto(kind, tiny_model)


def test_plates_that_pyros_guides_do_not_follow_are_refused():
    for kind in (A.AutoDiagonalNormal, A.AutoStructured, A.AutoIAFNormal, A.AutoLaplaceApproximation):
        with pytest.raises(pl.UserError, match=r"in a subsample of 'data', and .* has no loc for the rest of it"):
            pl.guides.auto(kind, subsampled)
    with pytest.raises(pl.UserError, match="in the loop 'steps', which Pyro's guides refuse; use mean_field"):
        pl.guides.auto(A.AutoNormal, loop)


def test_building_a_guide_changes_no_class_of_pyro(tiny_model):
    before = dict(A.AutoGaussian.backends)
    with pytest.raises(pl.UserError):
        pl.guides.auto(A.AutoGaussian, tiny_model)
    assert A.AutoGaussian.backends == before


@pytest.mark.parametrize("kind", [A.AutoNormal, A.AutoDelta])
def test_a_hyperprior_below_its_weight_is_refused_by_guides_that_keep_sites_as_attributes(kind):
    def below(site, shape):
        return dist.Normal(pyro.sample(f"{site}.mean", dist.Normal(0.0, 0.2)), 1.0)

    model = pl.BayesianClassifier(nn.Linear(3, 2), below, num_data=9)
    with pytest.raises(pl.UserError, match=r"site 'weight\.mean' lies below site 'weight', .* name it 'weight_mean'"):
        pl.guides.auto(kind, model)
    pl.guides.mean_field(model)
