"""Medians and quantiles of every family."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide as A
from pyro.infer.autoguide import AutoNormal

import pyro_lottery as pl
from tests.guides.models import linear, supports


class Below(dist.TransformedDistribution):
    """2 − exp(N(0, 1)), whose support is below 2."""

    support = constraints.less_than(2.0)

    def __init__(self):
        super().__init__(
            dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(2.0, -1.0)]
        )


def test_medians_and_quantiles_are_those_of_draws():
    def model():
        supports()
        pyro.sample("e", Below())

    guide = pl.guides.mean_field(model, 0.5)
    with pyro.plate("draws", 4000, dim=-1):
        draws = guide()
    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    for name in ("a", "c", "e"):
        seen = draws[name].detach()
        shares = torch.stack([(seen < value).float().mean(0) for value in quantiles[name]])
        expected = torch.tensor([0.1, 0.5, 0.9]).view(-1, *[1] * (shares.dim() - 1)).expand_as(shares)
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.025)  # 4000 draws: 5 standard errors
        assert torch.equal(guide.median()[name], quantiles[name][1])
    assert quantiles["b"].shape == (3, 4)


def test_quantiles_equal_autonormals_and_obey_masks(tiny_model, half_mask):
    ours, stock = pl.guides.mean_field(tiny_model, 0.3), pl.guides.auto(AutoNormal, tiny_model, 0.3)
    for name, value in stock.quantiles([0.05, 0.5, 0.9]).items():
        torch.testing.assert_close(ours.quantiles([0.05, 0.5, 0.9])[name], value)
    assert all(torch.equal(ours.median()[name], loc) for name, loc in pl.posterior(ours).loc.items())
    before = ours.quantiles(torch.tensor([0.0, 0.3]))
    with pl.handlers.sparsify(half_mask):
        under = ours.quantiles(torch.tensor([0.0, 0.3]))
        with pl.guides.compressed(ours):
            inside = ours.quantiles([0.0, 0.3])
    for name, value in under.items():
        mask = half_mask.get(name, torch.ones(value.shape[1:], dtype=torch.bool))
        assert torch.equal(value, torch.where(mask, before[name], 0.0))
        assert torch.equal(value, inside[name])
    with pytest.raises(pl.UserError, match=r"quantiles must be between 0 and 1, got \[2\.0\]"):
        ours.quantiles([2.0])


def test_every_quantile_of_a_point_is_its_value(tiny_model, half_mask):
    guide = pl.guides.deterministic(tiny_model)
    with pl.handlers.sparsify(half_mask):
        values = guide()
        for name, value in guide.quantiles([0.0, 0.5, 1.0]).items():
            assert torch.equal(value, values[name].expand_as(value))
            assert torch.equal(guide.median()[name], values[name])


CLOSED = (A.AutoNormal, A.AutoDiagonalNormal, A.AutoLowRankMultivariateNormal, A.AutoMultivariateNormal)


@pytest.mark.parametrize("kind", CLOSED)
def test_quantiles_are_those_of_the_posterior_and_0_where_pruned(kind, tiny_model, half_mask):
    guide = pl.guides.auto(kind, tiny_model, 0.3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    posterior, numbers = pl.posterior(guide), torch.tensor([0.0, 0.05, 0.5, 0.9])
    steps = dist.Normal(0.0, 1.0).icdf(numbers)
    dense = guide.quantiles(numbers)
    for name, loc in posterior.loc.items():
        torch.testing.assert_close(dense[name], loc + steps.view(-1, *[1] * loc.dim()) * posterior.scale[name])
    with pl.handlers.sparsify(half_mask):
        for name, value in guide.quantiles(numbers).items():
            mask = half_mask.get(name, torch.ones_like(posterior.loc[name], dtype=torch.bool))
            torch.testing.assert_close(value, torch.where(mask, dense[name], 0.0))
            torch.testing.assert_close(guide.median()[name], torch.where(mask, posterior.loc[name], 0.0))


@pytest.mark.parametrize("kind", [A.AutoDelta, A.AutoLaplaceApproximation])
def test_a_point_has_no_scales_and_one_quantile(kind, tiny_model, tiny_data, half_mask):
    guide = pl.guides.auto(kind, tiny_model)
    assert pl.guides.is_point(guide)
    assert pl.posterior(guide).scale is None
    with pl.handlers.sparsify(half_mask):
        pl.train(tiny_model, guide, tiny_data, epochs=1)
        values = guide()
        for name, value in guide.quantiles([0.1, 0.9]).items():
            assert torch.equal(value, values[name].expand_as(value))
            assert torch.equal(guide.median()[name], values[name])
        assert not values["hidden.weight"][~half_mask["hidden.weight"]].any()


def test_quantiles_of_guides_without_closed_form_are_those_of_draws():
    guide = pl.guides.auto(A.AutoIAFNormal, linear())
    quantiles, median = guide.quantiles([0.25, 0.75]), guide.median()
    draws = torch.stack([guide()["1.weight"] for _ in range(300)]).detach()
    between = (quantiles["1.weight"][0] < draws) & (draws < quantiles["1.weight"][1])
    assert abs(between.float().mean() - 0.5) < 0.03
    assert abs((draws < median["1.weight"]).float().mean() - 0.5) < 0.04


def test_quantiles_of_draws_are_0_where_pruned(tiny_model, half_mask):
    guide = pl.guides.auto(A.AutoStructured, tiny_model, 0.3)
    with pl.handlers.sparsify(half_mask):
        quantiles = guide.quantiles([0.1, 0.9])
    assert all((quantiles[site][:, ~mask] == 0).all() for site, mask in half_mask.items())
    assert (quantiles["conv.weight"][1] - quantiles["conv.weight"][0])[half_mask["conv.weight"]].min() > 0
