"""Reading and setting guides, and the optimizer's groups."""

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pyro_lottery as pl
from pyro_lottery import guides
from pyro_lottery.types import Posterior


def test_every_guide_knows_what_is_prunable(tiny_model):
    stock = AutoNormal(tiny_model)
    stock()
    for guide in (pl.guides.mean_field(tiny_model), pl.guides.auto(AutoDiagonalNormal, tiny_model), stock):
        assert pl.posterior(guide).prunable == ("conv.weight", "hidden.weight")
    pyro.clear_param_store()  # which a guide of Pyro's own keeps its parameters in


def test_a_rewind_copies_and_never_shares(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    kept = {site: loc.clone() for site, loc in start.loc.items()}
    guides.set_posterior_(guide, start)
    with torch.no_grad():
        guide.loc.add_(1.0)
    assert all(torch.equal(start.loc[s], kept[s]) for s in kept)
    assert all(torch.equal(tiny_model.initial_values()[s], kept[s]) for s in kept)


def test_wrong_sites_are_named(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    loc = {n: t for n, t in start.loc.items() if n != "conv.bias"}
    with pytest.raises(pl.UserError, match=r"loc/conv\.bias is missing"):
        guides.set_posterior_(guide, Posterior(loc, start.scale, start.prunable))
    with pytest.raises(pl.UserError, match="loc/extra is not in the network"):
        guides.set_posterior_(guide, Posterior(dict(start.loc) | {"extra": torch.ones(1)}, start.scale, start.prunable))
    wrong = dict(start.scale) | {"out.bias": torch.ones(2)}
    with pytest.raises(pl.UserError, match=r"scale/out\.bias is \(2,\)"):
        guides.set_posterior_(guide, Posterior(start.loc, wrong, start.prunable))


def test_scales_do_not_decay(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    decayed, rest = guides.parameter_groups(tiny_model, guide, 0.1)
    assert [id(p) for p in rest["params"]] == [id(guide.log_scale)]
    assert rest["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(guide.loc), *map(id, tiny_model.parameters())}
