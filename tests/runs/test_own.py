"""Networks, data and distributions that a user made in Python."""

from functools import partial

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery.runs.build import dense_ticket
from pyro_lottery.runs.own import Own, fingerprint
from pyro_lottery.runs.resume import differs


def made(network=None, prior=None, scale=0.01):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    data = pl.data.from_tensors(x, y, x, y)
    network = network or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    own = Own(network, data)
    model = own.model(prior or pl.priors.normal(1.0), 1.0)
    return own, model, data, dense_ticket(model, pl.guides.mean_field(model, scale))


def test_a_fingerprint_tells_values_code_prior_and_guide_apart():
    own, *trained = made()
    before = fingerprint(*trained)
    assert fingerprint(*made()[1:]) == before
    other_code = nn.Sequential(own.network[0], nn.ReLU(), own.network[2])
    found = fingerprint(*made(other_code)[1:])
    assert found["initial_values"] == before["initial_values"]
    assert found["log_joint"] != before["log_joint"]
    assert fingerprint(*made(own.network, pl.priors.normal(2.0))[1:])["log_joint"] != before["log_joint"]
    assert fingerprint(*made(own.network, scale=0.02)[1:])["log_scales"] != before["log_scales"]
    torch.manual_seed(1)
    assert fingerprint(*made(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))[1:]) != before


def test_a_fingerprint_tells_the_prior_of_one_layer():
    wide = nn.Sequential(nn.Linear(3, 400), nn.Tanh(), nn.Linear(400, 200), nn.Tanh(), nn.Linear(200, 2))
    before, found = (
        fingerprint(*made(wide, {"4.bias": pl.priors.normal(s), "*": pl.priors.normal(1.0)})[1:]) for s in (1.0, 3.0)
    )
    assert before["log_joint"] == pytest.approx(found["log_joint"], rel=1e-4)  # which hides two of 81,000 weights
    assert not differs(before, before)
    assert differs(before, found) == "prior"
    assert not differs(
        {n: v for n, v in before.items() if n not in ("options", "log_prior")}, before
    )  # of an earlier version


def test_a_fingerprint_tells_what_only_acts_in_training():
    def with_rate(rate):
        torch.manual_seed(0)
        return fingerprint(*made(nn.Sequential(nn.Linear(3, 4), nn.Dropout(rate), nn.Linear(4, 2)))[1:])

    one, other = with_rate(0.1), with_rate(0.9)
    assert {name for name in one if one[name] != other[name]} == {"options"}


def test_the_log_joint_is_that_of_prior_and_two_examples():
    own, model, data, dense = made()
    with torch.no_grad():
        prior = sum(float(torch.distributions.Normal(0.0, 1.0).log_prob(p).sum()) for p in own.network.parameters())
        logits = own.network(data.train[:2])
        likelihood = torch.distributions.Categorical(logits=logits).log_prob(data.train.targets[:2]).sum()
    # Pyro's plate scales two examples up to six
    assert fingerprint(model, data, dense)["log_joint"] == pytest.approx(prior + 3 * float(likelihood), rel=1e-5)


def test_drawing_anew_leaves_the_network_as_it_is():
    own = made()[0]
    before = own.network[0].weight.clone()
    torch.manual_seed(5)
    other = own.drawn_anew().network
    assert torch.equal(own.network[0].weight, before)
    torch.manual_seed(5)
    assert torch.equal(other[0].weight, nn.Linear(3, 4).weight)


def test_drawing_anew_keeps_frozen_values_and_warns_of_values_of_another_spread():
    network = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2))
    network[0].requires_grad_(False)
    nn.init.normal_(network[2].weight, std=1.0)  # reset_parameters() draws within 1/√40
    own = made(network)[0]
    with pytest.warns(UserWarning, match=r"values of another spread than 2\.weight came with"):
        other = own.drawn_anew().network
    assert torch.equal(other[0].weight, network[0].weight)
    assert not torch.equal(other[2].weight, network[2].weight)


@pytest.mark.parametrize(
    ("likelihood", "line"),
    [
        (pl.BayesianRegressor, "likelihood BayesianRegressor: missing a required argument: 'noise_scale'.*functools.partial"),
        (lambda net: net, "too many positional arguments"),
        ("classifier", "likelihood is 'classifier'; it is called as"),
    ],
)  # fmt: skip
def test_a_likelihood_that_cannot_be_called_is_one_line(likelihood, line):
    own = made()[0]
    with pytest.raises(pl.UserError, match=line):
        Own(own.network, own.data, likelihood).model(pl.priors.normal(1.0), 1.0)


def test_what_a_likelihood_binds_is_what_the_run_has():
    own = made()[0]
    bound = partial(pl.BayesianClassifier, kl_temperature=0.5, num_data=6)
    assert Own(own.network, own.data, bound).model(pl.priors.normal(1.0), 0.5).kl_temperature == 0.5
    with pytest.raises(
        pl.UserError, match=r"binds kl_temperature=0\.5, but the run has 0\.1: give kl_temperature= to find_tickets"
    ):
        Own(own.network, own.data, bound).model(pl.priors.normal(1.0), 0.1)
    with pytest.raises(pl.UserError, match="binds num_data=60, but the run has 6"):
        Own(own.network, own.data, partial(bound, num_data=60)).model(pl.priors.normal(1.0), 0.5)


@pytest.mark.parametrize("kept", ["a result", "a generator"])
def test_a_network_that_cannot_be_copied_is_one_line(kept):
    own = made()[0]
    own.network.kept = own.network(torch.zeros(1, 3)) if kept == "a result" else (each for each in ())
    with pytest.raises(pl.UserError, match=r"copy\.deepcopy cannot copy the network"):
        own.model(pl.priors.normal(1.0), 1.0)
