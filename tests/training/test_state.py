import pytest
import torch

import pyro_lottery as pl
from tests.support import QUICK, TinyNet


def made(make):
    torch.manual_seed(0)
    model = pl.BayesianClassifier(TinyNet(), num_data=60)
    return model, make(model)


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
@pytest.mark.parametrize("masked", [False, True])
def test_three_calls_with_one_state_have_the_bits_of_one_call_of_three_epochs(make, masked, tiny_data, half_mask):
    options = QUICK | {"milestones": (2,), "warmup_epochs": 2, "kl_warmup_epochs": 2, "train_samples": 2}

    def trained(calls, epochs):
        (model, guide), state, history = made(make), pl.TrainState(), []
        for _ in range(calls):
            with pl.handlers.sparsify(half_mask if masked else {}):
                history += pl.train(model, guide, tiny_data, **options | {"epochs": epochs}, state=state)
            pl.predict(model, guide, tiny_data.test)  # whatever happens in between
        assert state.epoch == 3
        for row in history:
            del row["seconds"]
        return history, guide.state_dict() | model.state_dict()

    (one, once), (three, thrice) = trained(1, 3), trained(3, 1)
    assert three == one
    assert all(torch.equal(thrice[name], value) for name, value in once.items())
    assert [row["epoch"] for row in one] == [1, 2, 3]


def test_a_state_of_another_training_is_refused_before_the_first_step(tiny_data, half_mask):
    (model, guide), state = made(pl.guides.mean_field), pl.TrainState()
    pl.train(model, guide, tiny_data, **QUICK, state=state)
    before = pl.posterior(guide).loc
    other = {name: ~mask for name, mask in half_mask.items()}  # as many weights, others
    with pl.handlers.sparsify(half_mask), pytest.raises(pl.UserError, match=r"another .* mask; .* TrainState\(2\)"):
        pl.train(model, guide, tiny_data, **QUICK, state=state)
    assert all(torch.equal(value, before[name]) for name, value in pl.posterior(guide).loc.items())
    state = pl.TrainState(state.epoch)
    with pl.handlers.sparsify(half_mask):
        rows = pl.train(model, guide, tiny_data, **QUICK, state=state)
    assert [row["epoch"] for row in rows] == [3, 4]
    with pl.handlers.sparsify(other), pytest.raises(pl.UserError, match="Adam's moments of another network, guide or"):
        pl.train(model, guide, tiny_data, **QUICK, state=state)
    point = made(pl.guides.deterministic)
    with pl.handlers.sparsify(half_mask), pytest.raises(pl.UserError, match="Adam's moments of another network"):
        pl.train(*point, tiny_data, **QUICK, state=state)
    with pytest.raises(pl.UserError, match="whole number, at least 0, got -1"):
        pl.train(model, guide, tiny_data, **QUICK, state=pl.TrainState(-1))
