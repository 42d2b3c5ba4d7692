"""Lists of guides."""

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide as A

import pyro_lottery as pl


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
