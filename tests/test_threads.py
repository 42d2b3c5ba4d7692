"""Threads that predict, each with a mask of its own, get the bits of one thread that calls after the other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK

import pyro_lottery as pl
from pyro_lottery.handlers import sparsify
from pyro_lottery.runs.trained import TrainedNetwork
from pyro_lottery.threads import TURN, OwnHandler
from tests.support import TinyNet


def network(level, data):
    """A network of its own weights and mask, under the same names as others."""
    torch.manual_seed(level)
    model = pl.BayesianClassifier(TinyNet(), num_data=len(data.train))
    guide = pl.guides.mean_field(model, 0.5)
    mask = {site: torch.rand(model.initial_values()[site].shape) < 0.5 for site in model.prunable}
    return TrainedNetwork(model, guide, mask if level else {}, level, "32", "auto")


@pytest.fixture
def networks(tiny_data):
    return [network(level, tiny_data) for level in range(3)]


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    before = pyro.settings.get("module_local_params")
    yield
    assert not _PYRO_STACK
    assert pyro.settings.get("module_local_params") == before


def in_threads(function, count=64, threads=8):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, range(count)))


def test_seeded_predictions_have_the_bits_of_sequential_calls(networks, tiny_data):
    def call(number):
        trained = networks[number % 3]
        if number % 4 == 3:
            return trained.predict_mean(tiny_data.test)
        if number % 4 == 2:
            return torch.stack([p.probs for p in trained.predictives(tiny_data.test, 3, seed=number)])
        return trained.predict(tiny_data.test, 3, seed=number, aggregate=number % 4 == 0)

    expected, state = list(map(call, range(64))), torch.get_rng_state()
    modes = [module.training for trained in networks for module in trained.model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(in_threads(call), expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for trained in networks for module in trained.model.modules()] == modes


def test_masks_that_threads_enter_act_on_each_alone(networks, tiny_data):
    def call(number):
        trained = networks[number % 3]
        with sparsify(trained.mask) if number % 3 else sparsify({}):
            return pl.predict_mean(trained.model, trained.guide, tiny_data.test)

    def dense(number):
        return pl.predict_mean(networks[0].model, networks[0].guide, tiny_data.test) if number % 2 else call(number)

    for function in (call, dense):
        expected = list(map(function, range(64)))
        assert all(torch.equal(a, b) for a, b in zip(in_threads(function), expected, strict=True))


def test_unseeded_predictions_are_those_of_sequential_calls_in_some_order(networks, tiny_data):
    def call(_):
        with sparsify(networks[1].mask):
            return pl.predict(networks[1].model, networks[1].guide, tiny_data.test, 3)

    found = []
    for run in (lambda: map(call, range(64)), lambda: in_threads(call)):
        torch.manual_seed(5)
        found.append({tuple(probs.flatten().tolist()) for probs in run()})
    assert found[0] == found[1]
    assert len(found[0]) == 64


def test_networks_are_built_in_threads_as_in_one(tiny_data):
    """Each beside others that predict: what a guide learns of its model passes Pyro's stack too."""

    def call(number):
        torch.manual_seed(0)  # of all threads: only the network's structure is looked at
        model = pl.BayesianClassifier(TinyNet(), num_data=60)
        guide = pl.guides.auto(pyro.infer.autoguide.AutoNormal, model)
        assert pl.predict_mean(model, guide, tiny_data.test).shape == (24, 3)
        return set(pl.posterior(guide).loc)

    assert all(names == call(0) for names in in_threads(call, 12))


def test_predictions_beside_a_training_change_neither(networks, tiny_data):
    def trained(taught):
        with sparsify(taught.mask):
            history = pl.train(taught.model, taught.guide, tiny_data, epochs=5, batch_size=6)
        return pl.posterior(taught.guide).loc, [row["loss"] for row in history]

    def predicted(number):
        return networks[number % 3].predict(tiny_data.test, 2, seed=number)

    (locs, losses), expected = trained(network(1, tiny_data)), list(map(predicted, range(64)))
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(trained, network(1, tiny_data))
        found = list(map(predicted, range(64)))
        after, later = training.result()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert later == losses
    assert all(torch.equal(after[site], locs[site]) for site in locs)


def test_handlers_that_act_on_all_threads_are_entered_in_turn(tiny_data, monkeypatch):
    """Another thread would find them on Pyro's stack, or leave one below them, and then wait for ever."""
    real, entered, early = Messenger.__enter__, set(), set()

    def enter(handler):
        name = type(handler).__name__
        entered.add(name)
        if not isinstance(handler, OwnHandler) and not TURN._is_owned():
            early.add(name)
        return real(handler)

    monkeypatch.setattr(Messenger, "__enter__", enter)
    trained = network(1, tiny_data)
    model, guide = trained.model, trained.guide
    with sparsify(trained.mask):
        pl.train(model, guide, tiny_data, epochs=1, batch_size=30, precision="auto")
        pl.predict(model, guide, tiny_data.test, 2)
        pl.predict_mean(model, guide, tiny_data.test)
        pl.posterior(guide)
    pl.guides.auto(pyro.infer.autoguide.AutoIAFNormal, model).quantiles([0.5])
    assert {"BlockMessenger", "TraceMessenger", "ScaleMessenger", "SparsifyMessenger"} <= entered
    assert not early


def test_a_call_that_meets_anothers_handler_does_not_keep_the_turn(networks):
    """Pyro raises where a handler that another thread entered is left on top of its own."""
    stranger, net = Messenger(), networks[0].model.net
    with pytest.raises(ValueError, match="not on the bottom of the stack"), net._pyro_context:
        _PYRO_STACK.append(stranger)
    assert not TURN._is_owned()
    _PYRO_STACK.clear()


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_the_main_threads_mask_is_not_silently_left_out(networks, tiny_data):
    dense, masked = networks[:2]
    expected = pl.predict_mean(dense.model, dense.guide, tiny_data.test)

    def predict():
        return pl.predict_mean(dense.model, dense.guide, tiny_data.test)

    def predict_without():
        with sparsify({}):
            return predict()

    with sparsify(masked.mask):
        with pytest.raises(pl.UserError, match=r"site 'conv.weight': the main thread entered a handler"):
            in_another_thread(predict)
        assert torch.equal(in_another_thread(predict_without), expected)
        in_another_thread(lambda: masked.predict(tiny_data.test))
        pl.predict_mean(masked.model, masked.guide, tiny_data.test)


def test_two_threads_cannot_train_at_once(tiny_data):
    inside, done = threading.Event(), threading.Event()

    class Waiting(pl.training.Hooks):
        def epoch_ended(self, state):
            inside.set()
            assert done.wait(60)

    def train(hooks=None):
        taught = network(1, tiny_data)
        return pl.train(taught.model, taught.guide, tiny_data, epochs=1, batch_size=30, hooks=hooks)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(train, Waiting())
        assert inside.wait(60)
        with pytest.raises(pl.UserError, match="another thread is running train"):
            train()
        done.set()
        first.result()
    assert len(train()) == 1


def test_handlers_of_threads_leave_in_any_order():
    first, second = sparsify({}), sparsify({})
    first.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second.__enter__).result()
        assert list(_PYRO_STACK) == [first, second]
        first.__exit__(None, None, None)
        assert list(_PYRO_STACK) == [second]
        pool.submit(second.__exit__, None, None, None).result()
