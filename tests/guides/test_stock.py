"""Pyro's guides as guides.auto adapts them: masks, medians, quantiles, Laplace, structured guides, lists, plates."""

import copy
from operator import attrgetter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide as A
from torch import nn

import pyro_lottery as pl
from tests.guides.test_families import loop, nested, subsampled, supports

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


def _small():
    return pl.BayesianClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), num_data=60, kl_temperature=0.1)


def test_quantiles_of_guides_without_closed_form_are_those_of_draws():
    guide = pl.guides.auto(A.AutoIAFNormal, _small())
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


def test_a_structured_guides_posterior_is_estimated_from_draws(tiny_data):
    model = _small()
    guide = pl.guides.auto(A.AutoStructured, model, 0.5, conditionals="normal")
    with torch.no_grad():
        for name in model.sites:
            attrgetter(f"{name}_unconstrained")(guide.locs).add_(1.0)
    locs = {name: attrgetter(name)(guide.locs).detach() for name in model.sites}
    scales = {name: attrgetter(name)(guide.scales).detach() for name in model.sites}
    posterior = pl.posterior(guide)
    assert posterior.draws == pl.guides.DRAWS
    assert list(posterior.loc) == list(model.sites)
    for name, loc in posterior.loc.items():
        error = (loc.reshape(-1) - locs[name]) / scales[name]
        assert error.abs().max() < 5 / posterior.draws**0.5
        assert ((posterior.scale[name].reshape(-1) / scales[name]).log().abs() < 5 / (2 * posterior.draws) ** 0.5).all()
        torch.testing.assert_close(guide.median()[name].reshape(-1), locs[name])
    pl.train(model, guide, tiny_data, epochs=1)
    assert pl.predict_mean(model, guide, tiny_data.test).shape == (24, 3)
    other = pl.guides.auto(A.AutoStructured, model, 0.5, conditionals="normal")
    trained = pl.posterior(guide)
    pl.guides.set_posterior_(other, trained)
    assert all(torch.equal(loc, pl.posterior(other).loc[name]) for name, loc in trained.loc.items())
    points = pl.guides.auto(A.AutoStructured, model, conditionals="delta")
    assert pl.guides.is_point(points)
    assert pl.posterior(points).scale is None


def test_a_structured_guide_under_a_mask_is_refused_before_the_first_step(tiny_model, tiny_data, half_mask):
    guide = pl.guides.auto(A.AutoStructured, tiny_model)
    with pytest.raises(pl.UserError, match="cannot be masked"), pl.handlers.sparsify(half_mask):
        pl.train(tiny_model, guide, tiny_data, epochs=1)


def _list(model, first=pl.guides.mean_field, second=lambda m: pl.guides.auto(A.AutoDiagonalNormal, m)):
    guide = pl.guides.auto(A.AutoGuideList, model)
    guide.append(first(poutine.block(model, hide=["out.weight", "out.bias"])))
    guide.append(second(poutine.block(model, expose=["out.weight", "out.bias"])))
    return guide


def test_a_list_of_guides_trains_is_read_and_pruned(tiny_model, tiny_data, half_mask):
    guide = _list(tiny_model)
    before = pl.posterior(guide)
    assert list(before.loc) == list(tiny_model.sites)
    assert before.draws == 0
    assert set(before.scale) == set(before.loc)
    with pl.handlers.sparsify(half_mask):
        pl.train(tiny_model, guide, tiny_data, epochs=2, milestones=())
        after = pl.posterior(guide)
        assert not guide.median()["hidden.weight"][~half_mask["hidden.weight"]].any()
        assert guide.quantiles([0.1, 0.9])["out.weight"].shape == (2, 3, 6)
        assert pl.predict(tiny_model, guide, tiny_data.test).shape == (24, 3)
    for name, loc in after.loc.items():
        mask = half_mask.get(name, torch.ones_like(loc, dtype=torch.bool))
        assert not loc[~mask].any()
        assert (loc[mask] != before.loc[name][mask]).any(), name
    other = _list(tiny_model)
    pl.guides.set_posterior_(other, after)
    assert all(torch.equal(scale, pl.posterior(other).scale[name]) for name, scale in after.scale.items())
    copy.deepcopy(guide)()


def test_every_kind_can_be_part_of_a_list_also_of_pyros_own(tiny_model):
    for kind in (A.AutoNormal, A.AutoDelta, A.AutoMultivariateNormal, A.AutoStructured, A.AutoIAFNormal):
        ours = _list(tiny_model, second=lambda m, kind=kind: pl.guides.auto(kind, m))
        assert set(ours()) == set(tiny_model.sites)
        stock = A.AutoGuideList(tiny_model)
        stock.append(pl.guides.mean_field(poutine.block(tiny_model, hide=["out.weight"])))
        stock.append(pl.guides.auto(kind, poutine.block(tiny_model, expose=["out.weight"])))
        assert set(stock()) == set(tiny_model.sites)
        pyro.clear_param_store()


def test_a_list_that_does_not_cover_the_model_once_is_refused(tiny_model, tiny_data):
    guide = pl.guides.auto(A.AutoGuideList, tiny_model)
    with pytest.raises(pl.UserError, match="has no parts yet"):
        pl.train(tiny_model, guide, tiny_data, epochs=1)
    guide.append(pl.guides.mean_field(poutine.block(tiny_model, hide=["out.bias"])))
    with pytest.raises(pl.UserError, match=r"of another model: out\.bias is missing$"):
        pl.train(tiny_model, guide, tiny_data, epochs=1)
    with pytest.raises(pl.UserError, match=r"site 'conv\.weight' is in another part already"):
        guide.append(pl.guides.mean_field(tiny_model))
    with pytest.raises(pl.UserError, match="a part is a guide built by"):
        guide.append(lambda: None)
    mixed = _list(tiny_model, pl.guides.deterministic)
    pl.train(tiny_model, mixed, tiny_data, epochs=1)
    with pytest.raises(pl.UserError, match="Point, a part of this guide, is a point and has no scale"):
        pl.posterior(mixed)
    assert pl.guides.is_point(_list(tiny_model, pl.guides.deterministic, pl.guides.deterministic))


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


def test_plates_that_pyros_guides_do_not_follow_are_refused():
    for kind in (A.AutoDiagonalNormal, A.AutoStructured, A.AutoIAFNormal, A.AutoLaplaceApproximation):
        with pytest.raises(pl.UserError, match=r"in a subsample of 'data', and .* has no loc for the rest of it"):
            pl.guides.auto(kind, subsampled)
    with pytest.raises(pl.UserError, match="in the loop 'steps', which Pyro's guides refuse; use mean_field"):
        pl.guides.auto(A.AutoNormal, loop)


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


def test_building_a_guide_changes_no_class_of_pyro(tiny_model):
    before = dict(A.AutoGaussian.backends)
    with pytest.raises(pl.UserError):
        pl.guides.auto(A.AutoGaussian, tiny_model)
    assert A.AutoGaussian.backends == before
