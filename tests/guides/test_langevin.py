"""Langevin dynamics on a posterior that is known."""

from itertools import pairwise

import pyro
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery.distributed import Ranks
from pyro_lottery.guides.langevin import Langevin
from tests.support import QUICK, tiny


@pytest.mark.parametrize("friction", [1.0, 0.1])
@pytest.mark.parametrize("small", [True, False])
def test_samples_have_the_variance_of_a_gaussian(small, friction):
    """L = s Σ λ w²/2 has exp(−L/s) = N(0, 1/λ); with second moments that are 0, where the bound acts, and with others.

    20,000 correlated samples: means within 0.3 standard deviations, variances within a quarter; the step adds at most 8 %.
    """
    torch.manual_seed(0)
    precision, noise = torch.tensor([40.0, 100.0, 320.0]), 0.02
    w = nn.Parameter(torch.zeros(3))
    optimizer = Langevin([{"params": [w], "weight_decay": 0.0}], 0.03, [w], friction, fused=True)
    w.grad = torch.zeros(3) if small else torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    with torch.no_grad():
        w.zero_()
    optimizer.rest_()
    optimizer.noise, samples = noise, []
    for _ in range(20_000):
        w.grad = noise * precision * w.detach()
        optimizer.step()
        samples.append(w.detach().clone())
    found = torch.stack(samples)
    assert float((found.mean(0) * precision.sqrt()).abs().max()) < 0.3
    torch.testing.assert_close(found.var(0) * precision, torch.ones(3), rtol=0, atol=0.25)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_training_samples_in_its_last_quarter(decay, tiny_data):
    model, guide = tiny(pl.guides.sgld, prior=pl.priors.normal(1.0))
    seen = []

    class Hooks(pl.training.Hooks):
        def stopping(self):
            seen.append(guide.loc.detach().clone())
            return False

        def epoch_ended(self, state):
            self.stopping()

    pl.train(model, guide, tiny_data, **QUICK | {"epochs": 4, "weight_decay": decay}, hooks=Hooks())
    plain, point = tiny(pl.guides.deterministic, prior=pl.priors.normal(1.0))
    pl.train(plain, point, tiny_data, **QUICK | {"epochs": 3, "weight_decay": decay})
    assert torch.equal(seen[11], point.loc)  # until then it is Adam
    assert guide.taken == 4
    steps = [float((b - a).abs().max()) for a, b in pairwise(seen[11:])]
    assert (
        max(steps) < 0.02
    )  # of noise that is bounded by the learning rate of 0.001, up to a few standard deviations, and drift


def test_without_noise_it_is_adam_and_with_it_the_step_is_the_formula():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    other = nn.Parameter(torch.tensor([5.0]))
    langevin = Langevin([{"params": [ours, other], "weight_decay": 0.1}], 0.1, [ours], fused=True)
    adam = torch.optim.Adam([{"params": [theirs], "weight_decay": 0.1}], 0.1, fused=True)
    for _ in range(3):
        for optimizer, parameter in ((langevin, ours), (adam, theirs)):
            optimizer.zero_grad()
            (parameter**2).sum().backward()
            if optimizer is langevin:
                other.grad = torch.ones(1)
            optimizer.step()
    assert torch.equal(ours, theirs)
    before, moments = ours.detach().clone(), langevin.state[ours]["exp_avg_sq"].clone()
    langevin.noise, ours.grad, other.grad = 0.5, torch.tensor([0.3, -0.7]), torch.ones(1)
    there = other.detach().clone()
    torch.manual_seed(7)
    langevin.step()
    torch.manual_seed(7)
    preconditioner = (1 / ((moments / (1 - 0.999**3)).sqrt() + 1e-8)).clamp(max=0.1 / (2 * 0.5))
    drift = 0.1 * preconditioner * (torch.tensor([0.3, -0.7]) + 0.1 * before)
    expected = before - drift + (2 * 0.1 * 0.5 * preconditioner).sqrt() * torch.randn(2)
    torch.testing.assert_close(ours.detach(), expected)
    assert torch.equal(langevin.state[ours]["exp_avg_sq"], moments)
    assert not torch.equal(other, there)  # what is not sampled goes on by Adam


def test_with_friction_a_step_is_that_of_the_velocity():
    torch.manual_seed(0)
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Langevin([{"params": [w], "weight_decay": 0.1}], 0.1, [w], 0.1, fused=True)
    w.grad = torch.tensor([0.5, 0.0])
    optimizer.step()
    assert bool(optimizer.state[w]["exp_avg"][0] != 0)
    optimizer.rest_()
    start, moments = w.detach().clone(), optimizer.state[w]["exp_avg_sq"].clone()
    optimizer.noise = 0.5
    preconditioner = (1 / ((moments / (1 - 0.999)).sqrt() + 1e-8)).clamp(max=0.1 / (2 * 0.5))
    velocity, place = torch.zeros(2), start
    for gradient in (torch.tensor([0.3, -0.7]), torch.tensor([0.2, 0.1])):
        torch.manual_seed(7)
        w.grad = gradient
        optimizer.step()
        torch.manual_seed(7)
        noise = (2 * 0.1 * 0.1 * 0.5 * preconditioner).sqrt() * torch.randn(2)
        velocity = 0.9 * velocity - 0.1 * preconditioner * (gradient + 0.1 * place) + noise
        place = place + velocity
        torch.testing.assert_close(w.detach(), place)


@pytest.mark.parametrize("make", [pl.guides.sgld, pl.guides.sghmc])
def test_several_devices_would_have_noise_of_their_own(make, tiny_data):
    class Two(Ranks):
        world = 2

    model, guide = tiny(make, prior=pl.priors.normal(1.0))
    with pytest.raises(pl.UserError, match="adds noise to each step and trains on one device"):
        pl.train(model, guide, tiny_data, **QUICK, ranks=Two())


@pytest.mark.parametrize("make", [pl.guides.sgld, pl.guides.sghmc])
def test_what_would_not_sample_the_posterior_is_said(make, tiny_data):
    def hyper(site, shape):
        return pyro.distributions.Normal(0.0, pyro.sample("tau", pyro.distributions.LogNormal(0.0, 1.0)))

    with pytest.raises(pl.UserError, match="samples numbers on the real line, and 'tau' is not on it"):
        tiny(make, prior=hyper)
    model, guide = tiny(make, prior=pl.priors.normal(1.0))
    with pytest.raises(pl.UserError, match="which sample with the moments of those before, and there are none"):
        pl.train(model, guide, tiny_data, **QUICK | {"epochs": 1}, state=pl.TrainState(3))
    with pytest.warns(UserWarning, match="with the learning rate 1e-05 for .* steps, in which a weight moves by"):
        pl.train(*tiny(make, prior=pl.priors.normal(1.0)), tiny_data, **QUICK | {"lr": 1e-5})
