"""The KL temperature on guides, and copies of them."""

import copy
import pickle

import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pyro_lottery as pl


def test_the_temperature_scales_guide_and_prior_alike(tiny_model, tiny_data):
    for guide in (pl.guides.mean_field(tiny_model), pl.guides.auto(AutoDiagonalNormal, tiny_model)):
        q = poutine.trace(guide).get_trace()
        p = poutine.trace(poutine.replay(tiny_model, q)).get_trace(tiny_data.test[:5])
        assert {s["scale"] for s in q.nodes.values() if s["type"] == "sample"} == {0.1}
        assert p.nodes["conv.weight"]["scale"] == 0.1
        assert p.nodes["y"]["scale"] == 60 / 5


@pytest.mark.parametrize("kind", [None, AutoNormal, AutoDiagonalNormal])
def test_the_temperature_may_change_after_the_guide_was_built(kind, tiny_model, tiny_data):
    def kl(model, guide):
        torch.manual_seed(0)
        return pl.ELBO().terms(model, guide, tiny_data.test[:5], tiny_data.test.labels[:5]).tempered_kl.item()

    guide = pl.guides.mean_field(tiny_model) if kind is None else pl.guides.auto(kind, tiny_model)
    kl_of_a_tenth = kl(tiny_model, guide)
    copies = copy.deepcopy((tiny_model, guide))
    tiny_model.kl_temperature = 0.5
    assert kl(tiny_model, guide) == pytest.approx(5 * kl_of_a_tenth)
    assert kl(*copies) == kl_of_a_tenth
    copies[0].kl_temperature = 1.0
    assert kl(*copies) == pytest.approx(10 * kl_of_a_tenth)


@pytest.mark.parametrize("kind", [None, AutoNormal])
def test_copies_and_pickles_leave_the_living_guide_alone(kind, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model) if kind is None else pl.guides.auto(kind, tiny_model)
    model_copy, guide_copy = copy.deepcopy((tiny_model, guide))
    if kind is None:
        pickle.dumps(guide.state_dict())
    pl.train(tiny_model, guide, tiny_data, epochs=1, train_samples=1)
    pl.train(model_copy, guide_copy, tiny_data, epochs=1, train_samples=1)
    a, b = pl.posterior(guide), pl.posterior(guide_copy)
    assert all(torch.equal(a.loc[s], b.loc[s]) for s in a.loc)
