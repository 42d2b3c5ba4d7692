"""``--sparse auto`` measures whole training steps, of a copy of the network, where a layer alone is faster sparse."""

import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import faster
from pyro_lottery.handlers.sparse_layers import CHOICES, SparseLayers
from pyro_lottery.kernels import native
from pyro_lottery.training import sparse_for_data, sparsity
from tests.support import TinyNet, small_run

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
LONG = {"epochs": 100, "batch_size": 16, "precision": "32"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty cache folder, and a clock by which a step takes ``.seconds`` of its choice; ``.steps`` are those taken."""
    made = SimpleNamespace(seconds=dict.fromkeys(CHOICES, 1.0), now=0.0, steps=[], way="sparse")

    class Layers(SparseLayers):
        def __enter__(self):
            made.steps.append(self.choice)
            made.now += made.seconds[self.choice]
            if self.choice != "off":
                self.ways["a layer"] = made.way
            return super().__enter__()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(faster, "_known", {})
    monkeypatch.setattr(faster, "time", SimpleNamespace(perf_counter=lambda: made.now))
    monkeypatch.setattr(sparsity, "sparse_layers", Layers)
    return made


@pytest.mark.parametrize("quickest", CHOICES)
@pytest.mark.parametrize("guide", [pl.guides.mean_field, pl.guides.deterministic])
def test_the_choice_whose_steps_take_least_time(guide, quickest, machine, tiny_model, tiny_data, half_mask):
    machine.seconds[quickest] = 0.5
    own = guide(tiny_model)
    before = [p.clone() for p in own.parameters()], {n: b.clone() for n, b in tiny_model.net.named_buffers()}
    state = torch.get_rng_state()
    assert sparse_for_data("auto", half_mask, tiny_model, own, tiny_data, **LONG) == quickest
    assert len(machine.steps) == 1 + len(CHOICES) * (1 + faster.ROUNDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), before[0], strict=True))
    assert all(torch.equal(b, before[1][n]) for n, b in tiny_model.net.named_buffers())
    machine.seconds = {"auto": 3.0, "on": 2.0, "off": 1.0}
    machine.steps.clear()
    assert sparse_for_data("auto", half_mask, tiny_model, own, tiny_data, **LONG) == quickest, (
        "the first measurement counts"
    )
    assert machine.steps == ["auto"]


def test_nothing_is_measured_where_it_would_not_pay(machine, tiny_model, tiny_data, half_mask):
    guide, full = pl.guides.mean_field(tiny_model), {n: torch.ones_like(m) for n, m in half_mask.items()}
    for choice in ("on", "off"):
        assert sparse_for_data(choice, half_mask, tiny_model, guide, tiny_data, **LONG) == choice
    assert sparse_for_data("auto", full, tiny_model, guide, tiny_data, **LONG) == "auto"
    assert sparse_for_data("auto", half_mask, tiny_model, guide, tiny_data, **LONG | {"epochs": 49}) == "auto"
    assert machine.steps == [], "49 epochs of 4 steps are fewer than 200"
    machine.way, machine.seconds["off"] = "dense", 0.5
    assert sparse_for_data("auto", half_mask, tiny_model, guide, tiny_data, **LONG) == "auto"
    assert machine.steps == ["auto"], "no layer alone is faster sparse"


def test_a_network_that_cannot_be_copied_keeps_the_choice_by_layer(machine, tiny_model, tiny_data, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    tiny_model.net.stream = (i for i in range(3))
    assert sparse_for_data("auto", half_mask, tiny_model, guide, tiny_data, **LONG) == "auto"
    assert machine.steps == []


def test_a_level_trains_as_is_fastest_and_its_manifest_says_so(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(sparsity, "STEPS", 2)
    machine.seconds["off"] = 0.5
    run = small_run(tmp_path / "run", levels=1, epochs=1, sparse="auto")
    assert run.folder.level(1).manifest().layers["training steps as a whole"] == "dense"
    assert "training steps as a whole" not in run.folder.level(0).manifest().layers
    machine.seconds["on"] = 0.25
    shutil.rmtree(tmp_path / "pyro_lottery")
    faster._known.clear()
    run = small_run(tmp_path / "other", levels=1, epochs=1, sparse="auto", seed=1)
    layers = run.folder.level(1).manifest().layers
    assert layers["training steps as a whole"] == "sparse"
    assert all(way == "sparse" for what, way in layers.items() if "trained" in what)


def test_a_trial_leaves_the_random_numbers_of_python_and_numpy_alone(
    machine, tiny_model, tiny_data, half_mask, monkeypatch
):
    inner = TinyNet.forward
    monkeypatch.setattr(TinyNet, "forward", lambda net, x: inner(net, x) * (1 + random.random() + np.random.rand()))
    before = random.getstate(), np.random.get_state()[1].tolist()
    sparse_for_data("auto", half_mask, tiny_model, pl.guides.mean_field(tiny_model), tiny_data, **LONG)
    assert len(machine.steps) > 1
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
