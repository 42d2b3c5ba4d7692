"""Guides of other models are refused."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide as A
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

import pyro_lottery as pl
from pyro_lottery import guides
from tests.guides.models import nested, subsampled


def _another(hidden=6):
    """A network with the sites of TinyNet, whose hidden layer may have another width, and its guide."""
    from tests.support import TinyNet

    net = TinyNet()
    net.hidden, net.out = nn.Linear(16, hidden), nn.Linear(hidden, 3)
    model = pl.BayesianClassifier(net, num_data=60, kl_temperature=0.1)
    return model, pl.guides.mean_field(model)


def _part(model, hidden="out.bias"):
    return pl.guides.auto(AutoNormal, poutine.block(model, hide=[hidden]))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda model: _another(hidden=5)[1], r"hidden\.weight is \(5, 16\), but the model's is \(6, 16\); hidden\.bias"),
        (lambda model: pl.guides.auto(AutoDiagonalNormal, _another(5)[0]), r"hidden\.weight is \(5, 16\), but the model's"),
        (lambda model: pl.guides.mean_field(pl.BayesianClassifier(nn.Linear(2, 3), num_data=60)), r"conv\.weight is miss"),
        (lambda model: pl.guides.mean_field(poutine.block(model, hide=["out.bias"])), r"of another model: out\.bias is m"),
        (_part, r"of another model: out\.bias is missing$"),
    ],
)  # fmt: skip
def test_a_guide_of_another_network_is_refused_before_the_first_step(guide, message, tiny_model, tiny_data):
    guide, state = guide(tiny_model), torch.get_rng_state()
    for use in (
        lambda: pl.train(tiny_model, guide, tiny_data, epochs=1),
        lambda: pl.predict(tiny_model, guide, tiny_data.test),
        lambda: pl.predict_mean(tiny_model, guide, tiny_data.test),
    ):
        with pytest.raises(pl.UserError, match=message):
            use()
    assert torch.equal(state, torch.get_rng_state()), "drew random numbers"


def test_a_guide_of_a_network_with_the_same_sites_and_shapes_is_taken(tiny_model, tiny_data):
    guide = _another()[1]
    pl.train(tiny_model, guide, tiny_data, epochs=1)
    assert pl.predict(tiny_model, guide, tiny_data.test).shape == (24, 3)
    joint = pl.guides.auto(AutoDiagonalNormal, _another()[0])
    state = torch.get_rng_state()
    guides.check_sites(tiny_model, joint)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_no_autoguide_is_refused_before_training_and_may_predict(tiny_model, tiny_data):
    def guide(*args):
        return {n: pyro.sample(n, dist.Delta(v, event_dim=v.dim())) for n, v in tiny_model.initial_values().items()}

    messenger = A.AutoNormalMessenger(tiny_model)
    for each in (guide, messenger):
        for use in (
            lambda each=each: pl.train(tiny_model, each, tiny_data, epochs=1),
            lambda each=each: pl.posterior(each),
            lambda each=each: pl.predict_mean(tiny_model, each, tiny_data.test),
        ):
            with pytest.raises(pl.UserError, match=r"expected a guide of pyro_lottery\.guides or of Pyro's AutoGuides"):
                use()
    expected = pl.predict_mean(tiny_model, pl.guides.mean_field(tiny_model), tiny_data.test)
    torch.testing.assert_close(pl.predict(tiny_model, guide, tiny_data.test), expected)


def test_guides_with_plates_are_copied_and_compared():
    guide = pl.guides.mean_field(subsampled)
    again = copy.deepcopy(guide)
    again()
    pl.guides.check_sites(subsampled, again)
    with pytest.raises(pl.UserError, match=r"m is not in the model; s is not in the model"):
        pl.guides.check_sites(nested, guide)
