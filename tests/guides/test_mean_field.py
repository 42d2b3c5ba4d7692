"""The mean-field family against closed forms and Pyro's AutoNormal."""

from dataclasses import replace
from operator import attrgetter

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence

import pyro_lottery as pl
from pyro_lottery import guides
from pyro_lottery.types import Posterior


def test_starts_at_the_networks_values_and_one_percent_of_the_kaiming_scale(tiny_model):
    values = {n: v.clone() for n, v in tiny_model.initial_values().items()}
    posterior = pl.posterior(pl.guides.mean_field(tiny_model, init_scale=0.01))
    assert list(posterior.loc) == list(tiny_model.sites) == list(values)
    for site, fan_in in {"conv.weight": 9, "conv.bias": 9, "hidden.weight": 16, "out.bias": 6}.items():
        assert torch.equal(posterior.loc[site], values[site])
        torch.testing.assert_close(
            posterior.scale[site], torch.full_like(values[site], 0.01 * (2 / fan_in) ** 0.5), rtol=1e-6, atol=0
        )


def test_kl_equals_the_sum_of_torch_kls(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=0.5)
    posterior = pl.posterior(guide)
    expected = sum(
        kl_divergence(dist.Normal(posterior.loc[s].double(), posterior.scale[s].double()), dist.Normal(0.0, 1.0)).sum()
        for s in posterior.loc
    )
    terms = pl.ELBO().terms(tiny_model, guide, tiny_data.test[:2], tiny_data.test.labels[:2])
    assert terms.tempered_kl.item() == pytest.approx(0.1 * expected.item(), rel=1e-5)


def test_same_family_as_stock_autonormal(tiny_model, tiny_data):
    ours, stock = pl.guides.mean_field(tiny_model), pl.guides.auto(AutoNormal, tiny_model)
    a, b = pl.posterior(ours), pl.posterior(stock)
    for site in a.loc:
        assert torch.equal(a.loc[site], b.loc[site])
        torch.testing.assert_close(a.scale[site], b.scale[site], rtol=1e-6, atol=0)
    draws = {"ours": [], "stock": []}
    for _ in range(400):
        for name, guide in (("ours", ours), ("stock", stock)):
            sample = guide()
            noise = [((sample[s] - a.loc[s]) / a.scale[s]).detach().flatten() for s in a.loc]
            draws[name].append(torch.cat(noise))
    for name, values in draws.items():  # 400 × 163 standard normal numbers
        values = torch.cat(values)
        count = len(values)
        assert abs(values.mean()) < 4 / count**0.5, name
        assert abs(values.var() - 1) < 4 * (2 / count) ** 0.5, name


def test_gradients_are_stock_autonormals_in_expectation(tiny_model, tiny_data):
    # Both see the same noise, one through AutoNormal's own graph: then not only the expectations are equal.
    ours, stock = pl.guides.mean_field(tiny_model, 0.3), pl.guides.auto(AutoNormal, tiny_model, 0.3)
    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]
    trace = poutine.trace(ours).get_trace(x, y)
    values = {name: trace.nodes[name]["value"].detach() for name in tiny_model.sites}
    (-poutine.trace(poutine.replay(tiny_model, trace=trace)).get_trace(x, y).log_prob_sum()).backward()
    latent = {f"{name}_unconstrained": value for name, value in values.items()}
    locs, scales = dict(stock.locs.named_parameters()), dict(stock.scales.named_parameters())
    weights = {}
    for name, value in latent.items():
        noise = (value - locs[name]).detach() / attrgetter(name.removesuffix("_unconstrained"))(stock.scales).detach()
        weights[name.removesuffix("_unconstrained")] = (
            locs[name] + attrgetter(name.removesuffix("_unconstrained"))(stock.scales) * noise
        )
    (-poutine.trace(poutine.condition(tiny_model, data=weights)).get_trace(x, y).log_prob_sum()).backward()
    for name, grad in ours.unpack(ours.loc.grad).items():
        torch.testing.assert_close(grad, locs[f"{name}_unconstrained"].grad, rtol=1e-4, atol=1e-4)
    for name, grad in ours.unpack(ours.log_scale.grad).items():
        # d/dlog σ = σ·d/dσ, and AutoNormal's σ is softplus of its parameter, with derivative 1 − exp(−σ)
        scale = attrgetter(name)(stock.scales).detach()
        expected = scales[f"{name}_unconstrained"].grad / (1 - (-scale).exp()) * scale
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [pl.guides.mean_field, lambda m: pl.guides.auto(AutoNormal, m)])
def test_restoring_a_posterior_gives_the_same_bits(make, tiny_model):
    guide = make(tiny_model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.copy_(torch.randn_like(parameter) * 3)
    saved = pl.posterior(guide)
    fresh = make(tiny_model)
    guides.set_posterior_(fresh, saved)
    again = pl.posterior(fresh)
    for site in saved.loc:
        assert torch.equal(saved.loc[site], again.loc[site])
        assert torch.equal(saved.scale[site], again.scale[site])


def test_pruned_scales_of_zero_come_back_as_one(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    scale = dict(start.scale) | {"out.bias": torch.zeros(3)}
    guides.set_posterior_(guide, Posterior(start.loc, scale, start.prunable))
    assert torch.equal(pl.posterior(guide).scale["out.bias"], torch.ones(3))


def test_a_scale_that_is_not_a_number_is_not_taken_for_a_pruned_one(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    site = tiny_model.sites[0]
    scale = {**start.scale, site: torch.full_like(start.scale[site], torch.nan)}
    pl.guides.set_posterior_(guide, replace(start, scale=scale))
    assert pl.posterior(guide).scale[site].isnan().all()


def test_a_posterior_without_scales_changes_nothing(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    before = pl.posterior(guide)
    other = {name: value + 1 for name, value in before.loc.items()}
    with pytest.raises(pl.UserError, match="needs scales"):
        pl.guides.set_posterior_(guide, pl.Posterior(other, None, before.prunable))
    assert all(torch.equal(t, before.loc[n]) for n, t in pl.posterior(guide).loc.items())


def pulled(scale, tiny_model, tiny_data, **options):
    """The scales of a guide that 40 steps towards a prior of ``scale`` have trained, and the guide."""
    tiny_model.set_prior_(pl.priors.normal(scale))
    guide = pl.guides.mean_field(tiny_model, **options)
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    for _ in range(40):
        optimizer.zero_grad()
        pl.ELBO().terms(tiny_model, guide, tiny_data.test[:4], tiny_data.test.labels[:4]).tempered_kl.backward()
        optimizer.step()
    return pl.posterior(guide).scale, guide


def test_no_scale_exceeds_its_bound_and_one_at_the_bound_may_return(tiny_model, tiny_data, half_mask):
    scale, guide = pulled(1.0, tiny_model, tiny_data, init_scale=0.2, max_scale=0.25)
    assert all((s <= 0.25 * (1 + 1e-6)).all() for s in scale.values())
    assert all((s > 0.249).all() for s in scale.values())
    free, _ = pulled(1.0, tiny_model, tiny_data, init_scale=0.2)
    assert all((s > 0.5).all() for s in free.values())
    # what is drawn, the quantiles and the moments have the bound too, dense and under a mask
    for mask in ({}, half_mask):
        with pl.handlers.sparsify(mask):
            values = torch.stack([guide()["conv.bias"] for _ in range(400)])
            low, high = guide.quantiles([0.1586553, 0.8413447])["conv.bias"]
        assert values.std(0).max() < 0.25 * 1.2
        torch.testing.assert_close((high - low) / 2, torch.full_like(low, 0.25), rtol=1e-4, atol=0)
    tiny_model.set_prior_(pl.priors.normal(0.01))
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        pl.ELBO().terms(tiny_model, guide, tiny_data.test[:4], tiny_data.test.labels[:4]).tempered_kl.backward()
        optimizer.step()
    assert all((s < 0.2).all() for s in pl.posterior(guide).scale.values())


def test_bounds_that_do_not_hold_are_refused(tiny_model, tiny_data):
    with pytest.raises(pl.UserError, match=r"scale of 'conv\.weight' is to be 0\.4714, above max_scale 0\.1"):
        pl.guides.mean_field(tiny_model, init_scale=1.0, max_scale=0.1)
    with pytest.raises(pl.UserError, match="max_scale must be greater than 0"):
        pl.guides.mean_field(tiny_model, max_scale=0.0)
    guide = pl.guides.mean_field(tiny_model, max_scale=0.1)
    before, wide = pl.posterior(guide), pl.posterior(pl.guides.mean_field(tiny_model, init_scale=1.0))
    with pytest.raises(pl.UserError, match="above max_scale"):
        pl.guides.set_posterior_(guide, replace(wide, loc={name: loc + 1 for name, loc in wide.loc.items()}))
    assert all(torch.equal(loc, before.loc[name]) for name, loc in pl.posterior(guide).loc.items()), "nothing was set"


def test_fixed_scales_stay_as_they_are(tiny_model, tiny_data, half_mask):
    guide = pl.guides.mean_field(tiny_model, train_scale=False)
    before = pl.posterior(guide)
    with pl.handlers.sparsify(half_mask):
        pl.train(tiny_model, guide, tiny_data, epochs=1, milestones=())
    after = pl.posterior(guide)
    assert all(torch.equal(before.scale[n], after.scale[n]) for n in before.loc)
    assert not torch.equal(before.loc["out.weight"], after.loc["out.weight"])
    assert not guide.log_scale.requires_grad
