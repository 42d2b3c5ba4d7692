import copy
from dataclasses import replace

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import training
from tests.support import QUICK, same, tiny


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
@pytest.mark.parametrize("masked", [False, True])
def test_three_calls_with_one_state_have_the_bits_of_one_call_of_three_epochs(make, masked, tiny_data, half_mask):
    options = QUICK | {"milestones": (2,), "warmup_epochs": 2, "kl_warmup_epochs": 2, "train_samples": 2}

    def trained(calls, epochs):
        (model, guide), state, history = tiny(make), pl.TrainState(), []
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
    (model, guide), state = tiny(), pl.TrainState()
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
    point = tiny(pl.guides.deterministic)
    with pl.handlers.sparsify(half_mask), pytest.raises(pl.UserError, match="Adam's moments of another network"):
        pl.train(*point, tiny_data, **QUICK, state=state)
    with pytest.raises(pl.UserError, match="whole number, at least 0, got -1"):
        pl.train(model, guide, tiny_data, **QUICK, state=pl.TrainState(-1))


def own_loop(model, guide, data, state, stop=None):
    """Epoch 0 and 1 by ``training.step``, as ``pl.train`` trains them; left at ``stop``, an epoch and a step, with the state there."""
    elbo = pl.ELBO()
    with pl.guides.compressed(guide):
        optimizer = torch.optim.Adam(pl.guides.parameter_groups(model, guide, 1e-4), 1e-3, fused=True)
        with state.using(optimizer):
            while state.epoch < 2:
                with training.epoch(model, data, state, batch_size=16, seed=3) as batches:
                    while state.step < len(batches):
                        if (state.epoch, state.step) == stop:
                            values = guide.state_dict(), model.net_state(), state.state_dict()
                            return copy.deepcopy(values)
                        x, y = batches.batch(state.step)
                        training.step(model, guide, elbo, optimizer, x, y, sums=state.sums)
                        state.step += 1
                state.next_epoch()
    return guide.state_dict(), model.net_state(), state.state_dict()


def kept(values, mask):
    """A guide's parameters, with 0 where ``mask`` prunes."""
    sites = {name: name.partition(".")[2] for name in values}
    return {name: value * mask[sites[name]] if sites[name] in mask else value for name, value in values.items()}


@pytest.mark.parametrize("stop", [(0, 3), (1, 0), (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("finish", ["own loop", "train"])
def test_a_saved_state_goes_on_within_an_epoch_with_the_same_bits(stop, masked, finish, tiny_data, half_mask, tmp_path):
    data = replace(tiny_data, augment="crop")  # whose random numbers are of the order's generator
    with pl.handlers.sparsify(half_mask if masked else {}):
        model, guide = tiny()
        history = pl.train(model, guide, data, **QUICK, seed=3)
        whole = guide.state_dict(), model.net_state()

        in_one_go = own_loop(*tiny(), data, pl.TrainState())
        torch.save(own_loop(*tiny(), data, pl.TrainState(), stop), tmp_path / "saved.pt")
        values, net, saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        assert (saved["epoch"], saved["step"]) == stop
        (model, guide), state = tiny(), pl.TrainState()
        torch.manual_seed(99)
        guide.load_state_dict(values)
        model.load_net_state(net)
        state.load_state_dict(saved)
        if finish == "train":
            row = pl.train(model, guide, data, **QUICK | {"epochs": 2 - stop[0]}, seed=3, state=state)[-1]
            assert {**row, "seconds": 0} == {**history[-1], "seconds": 0}
            resumed = guide.state_dict(), model.net_state()
        else:
            resumed = own_loop(model, guide, data, state)
    assert same(in_one_go[0], whole[0])
    assert same(in_one_go[1], whole[1])
    # What was saved of a compressed guide has no scales of pruned weights; no ticket has any either.
    mask = half_mask if masked else pl.masks.full(pl.posterior(guide))
    assert same(kept(resumed[0], mask), kept(whole[0], mask))
    assert same(resumed[1], whole[1])


def test_another_call_goes_on_in_the_epoch_in_which_one_was_interrupted(tiny_data):
    class Interrupting(training.Hooks):
        def stopping(self):
            return True

        def stop(self, state):
            raise KeyboardInterrupt

    model, guide = tiny()
    whole = pl.train(model, guide, tiny_data, **QUICK)
    (again, other), state = tiny(), pl.TrainState()
    with pytest.raises(KeyboardInterrupt):
        pl.train(again, other, tiny_data, **QUICK, state=state, hooks=Interrupting())
    assert (state.epoch, state.step) == (0, 1)
    rows = pl.train(again, other, tiny_data, **QUICK, state=state)
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert same(other.state_dict(), guide.state_dict())


def test_what_is_no_state_is_refused_and_changes_nothing(tiny_data):
    saved = own_loop(*tiny(), tiny_data, pl.TrainState(), (1, 2))[2]
    state = pl.TrainState(7)
    short = {"optimizer/0/exp_avg": saved["optimizer/0/exp_avg"][:-1]}
    for wrong in (
        {},
        {"epoch": 0},
        saved | {"epoch": 1.0},
        saved | {"step": -1},
        saved | {"history": [[]]},
        saved | {"history": [{"epoch": "x"}]},
        saved | {"sums": torch.zeros(2)},
        saved | {"seconds": "long"},
        saved | {"device": "no such"},
        saved | {"generator/noise": torch.zeros(3, dtype=torch.uint8)},
        {name: value for name, value in saved.items() if name != "generator/order"},
        {name: value for name, value in saved.items() if name != "optimizer/0/exp_avg"},
    ):
        with pytest.raises(pl.UserError, match=r"^this is no state of a training: "):
            state.load_state_dict(wrong)
    assert (state.epoch, state.moments) == (7, {})
    for wrong in (
        short,
        {"belongs": 1},
        {f"optimizer/-1/{n}": torch.zeros(()) for n in ("step", "exp_avg", "exp_avg_sq")},
    ):
        state.load_state_dict(saved | wrong)
        with pytest.raises(pl.UserError, match="Adam's moments of another network"):
            pl.train(*tiny(), tiny_data, **QUICK, state=state)
    state.load_state_dict(saved | {"step": 4})
    with pytest.raises(pl.UserError, match=r"step 4 of an epoch of 4 steps; call its next_epoch\(\)"):
        pl.train(*tiny(), tiny_data, **QUICK, state=state)
    loader = [(tiny_data.train[:30], tiny_data.train.labels[:30]), (tiny_data.train[30:], tiny_data.train.labels[30:])]
    state.load_state_dict(saved | {"step": 1})
    with pytest.raises(pl.UserError, match=r"a loader is read from its start; give TrainState\(1\)"):
        pl.train(*tiny(), loader, **QUICK, state=state)


def test_the_generators_of_a_state_may_be_views_of_larger_tensors(tiny_data):
    """Those that several ranks have gathered are; torch crashes on one."""
    saved = own_loop(*tiny(), tiny_data, pl.TrainState(), (1, 2))[2]
    views = {name: torch.stack([t, t])[1] for name, t in saved.items() if name.startswith("generator/")}
    state = pl.TrainState()
    state.load_state_dict(saved | views)
    assert same(state.generators, {name.removeprefix("generator/"): t for name, t in views.items()})


def test_a_state_of_another_kind_of_device_draws_other_noise(tiny_data):
    saved = own_loop(*tiny(), tiny_data, pl.TrainState(), (1, 2))[2]
    state = pl.TrainState()
    state.load_state_dict(saved | {"device": "cuda"})
    with pytest.warns(UserWarning, match="this epoch began on cuda; its random numbers begin anew on cpu"):
        own_loop(*tiny(), tiny_data, state)


def test_a_state_is_float32_whatever_the_default(tiny_data):
    torch.set_default_dtype(torch.float64)
    try:
        state = pl.TrainState()
        pl.train(*tiny(), tiny_data, **QUICK | {"epochs": 1}, state=state)
        again = pl.TrainState()
        again.load_state_dict(state.state_dict())
        assert (again.epoch, again.sums.dtype) == (1, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
