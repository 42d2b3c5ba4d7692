"""Pyro's guides on plates and supports, and those that have not met their model."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide as A

import pyro_lottery as pl
from tests.guides.models import nested, subsampled, supports


@pytest.mark.parametrize("kind", [A.AutoNormal, A.AutoDiagonalNormal, A.AutoMultivariateNormal, A.AutoDelta])
@pytest.mark.parametrize("model", [nested, supports])
def test_pyros_guides_on_plates_and_supports(kind, model):
    guide = pl.guides.auto(kind, model, 0.5)
    pl.ELBO().differentiable_loss(model, guide).backward()
    posterior = pl.posterior(guide)
    with torch.no_grad():
        values = {name: value.shape for name, value in guide().items()}
    for name, value in guide.quantiles([0.1, 0.5, 0.9]).items():
        assert value.shape == (3, *values[name])
        torch.testing.assert_close(value[1], pl.guides.values_at_loc(guide)[name])
        assert torch.equal(value[1], guide.median()[name])
    pl.guides.set_posterior_(pl.guides.auto(kind, model, 0.5), posterior)
    pl.guides.check_sites(model, guide)


@pytest.mark.parametrize("kind", [A.AutoNormal, A.AutoDelta])
def test_pyros_guides_of_separate_sites_follow_a_subsample(kind):
    guide = pl.guides.auto(kind, subsampled, 0.5)
    assert {name: loc.shape for name, loc in pl.posterior(guide).loc.items()} == {"m": (), "s": (8,), "z": (8, 2)}
    trace = poutine.trace(guide).get_trace()
    index, values = trace.nodes["data"]["value"], trace.nodes["z"]["value"]
    if kind is A.AutoDelta:
        assert torch.equal(values, pl.posterior(guide).loc["z"][index])
    assert trace.nodes["z"]["scale"] == 8 / 3
    assert guide.median()["z"].shape == (8, 2)
    pl.ELBO().differentiable_loss(subsampled, guide).backward()


def test_a_masked_site_of_pyros_guides_stays_over_the_reals():
    for kind in (A.AutoNormal, A.AutoDiagonalNormal, A.AutoDelta):
        guide = pl.guides.auto(kind, supports)
        with (
            pytest.raises(pl.UserError, match="'a' is not over all real numbers"),
            pl.handlers.sparsify({"a": torch.tensor([True, False, True])}),
        ):
            guide()


def test_a_guide_of_pyros_own_that_met_its_model_under_a_mask_is_refused(tiny_model, half_mask):
    guide = A.AutoNormal(tiny_model)
    with pl.handlers.sparsify(half_mask):
        guide()
    with pytest.raises(pl.UserError, match="met its model inside sparsify and keeps that mask"):
        pl.posterior(guide)
    pyro.clear_param_store()


def test_a_guide_that_has_not_met_its_model_is_named(tiny_model):
    for kind in (A.AutoNormal, A.AutoDiagonalNormal, A.AutoIAFNormal, A.AutoDelta):
        with pytest.raises(pl.UserError, match="has not met its model yet; build it with"):
            pl.posterior(kind(tiny_model))
