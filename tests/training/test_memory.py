import pyro
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery.runs.build import warn_of_memory
from pyro_lottery.runs.config import Config
from pyro_lottery.training.memory import step_memory, too_large
from tests.support import same, tiny


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_memory_is_that_counted_by_hand(estimator):
    model = pl.BayesianRegressor(nn.Linear(30, 7, bias=False), num_data=100, noise_scale=1.0)
    guide = pl.guides.mean_field(model)
    x, y = torch.randn(8, 30), torch.randn(8, 7)
    weights = 4 * 30 * 7
    fixed = 4 * 2 * weights + weights  # loc and log_scale with gradients and moments; the buffer of initial values
    if estimator == "weights":
        fixed += weights + weights  # the sample and its gradient
        each = 4 * (30 + 7 + 7)  # x, and the output's distance from its target, which its square keeps too
    else:
        fixed += (
            2 * weights + 3 * weights
        )  # gradients of mean and variance; these two and the sample that layers do not use
        each = 4 * (30 + 30 + 7 + 7 + 7)  # and x², and the noise
    with pyro.validation_enabled(False):
        found = {n: step_memory(model, guide, x, y, n, estimator) for n in (8, 108)}
    assert found[108] - found[8] == 100 * each
    assert found[8] == pytest.approx(fixed + 8 * each, rel=0.15)


def test_measuring_changes_nothing():
    model, guide = tiny()
    before, state = {**model.state_dict(), **guide.state_dict()}, torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    one = step_memory(model, guide, torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), 16)
    assert one == step_memory(model, guide, torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), 16)
    assert same(before, {**model.state_dict(), **guide.state_dict()})
    assert model.training
    torch.randn(4 * 16 * 2)
    assert not torch.equal(state, torch.get_rng_state())  # by the images of this test alone


def test_a_batch_that_does_not_fit_is_one_line_with_one_that_does():
    def needed(size):
        return 2**30 + size * 2**26

    assert too_large(needed, 16, 2**31) is None
    assert too_large(needed, 64, 2**31) == (
        "training with 64 examples a batch needs about 5.0 GiB, but 2.0 GiB of the GPU's memory are free; about 16 examples a batch fit "
        "(--batch-size)"
    )
    assert too_large(needed, 64, 2**29).endswith("; no batch fits")


def test_a_run_that_does_not_fit_is_warned_of(tiny_data):
    model, guide = tiny()
    config = Config(arch="lenet", batch_size=10_000)
    with pytest.warns(UserWarning, match=r"training with 10000 examples a batch needs about [\d.]+ GiB, but 0.0 GiB"):
        warn_of_memory(config, model, guide, tiny_data, free=2**20)
    warn_of_memory(config, model, guide, tiny_data, free=2**40)
