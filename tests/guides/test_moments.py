"""Guides whose marginals are estimated from draws."""

from operator import attrgetter

import pytest
import torch
from pyro.infer import autoguide as A

import pyro_lottery as pl
from tests.guides.models import linear


class Skewed(A.AutoIAFNormal):
    """A normalising flow: its marginals have no closed form."""


def test_marginals_without_closed_form_come_from_stated_draws(tiny_model):
    guide = pl.guides.auto(Skewed, tiny_model)
    first, again = pl.posterior(guide), pl.posterior(guide)
    assert first.draws == pl.guides.DRAWS
    assert all(torch.equal(first.loc[n], again.loc[n]) for n in first.loc), "the same draws each time"
    samples = [guide() for _ in range(400)]
    for name in first.loc:
        values = torch.stack([s[name] for s in samples])
        error = values.std(0) * (1 / 400 + 1 / first.draws) ** 0.5
        assert ((values.mean(0) - first.loc[name]).abs() < 5 * error).all()
        assert ((first.scale[name] / values.std(0)).log().abs() < 5 * (0.5 / 400 + 0.5 / first.draws) ** 0.5).all()
    few = pl.posterior(guide, draws=20)
    assert few.draws == 20
    with pytest.raises(pl.UserError, match="at least 2"):
        pl.posterior(guide, draws=1)


def test_a_guide_without_marginals_trains_is_scored_and_comes_back(tiny_model, tiny_data):
    guide = pl.guides.auto(Skewed, tiny_model)
    pl.train(tiny_model, guide, tiny_data, epochs=2, milestones=())
    posterior = pl.posterior(guide)
    scores = pl.scores.snr(posterior)
    assert all(t.isfinite().all() for t in scores.values())
    other = pl.guides.auto(Skewed, tiny_model)
    pl.guides.set_posterior_(other, posterior)
    assert all(torch.equal(t, pl.posterior(other).loc[n]) for n, t in posterior.loc.items())
    mask = pl.masks.shrink(pl.masks.full(posterior), scores, 0.5)
    with (
        pytest.raises(pl.UserError, match="no closed-form marginal over the surviving weights"),
        pl.handlers.sparsify(mask),
    ):
        other()


def test_a_structured_guides_posterior_is_estimated_from_draws(tiny_data):
    model = linear()
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
