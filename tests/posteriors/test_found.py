"""Scales that are found at a trained point."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import imp, masks, posteriors
from pyro_lottery.errors import Stopped
from pyro_lottery.guides.found import snapshots
from pyro_lottery.handlers import sparsify
from pyro_lottery.runs.checkpoint import LevelHooks
from pyro_lottery.runs.config import Config
from tests.support import QUICK, SMALL, fingerprint, same, small_run, tiny

NAMES = ["laplace", "swag", "sgld", "sghmc", "ivon"]
SHORT = SMALL | {"epochs": 3, "batch_size": 50, "levels": 1}


class Passing(pl.training.Hooks):
    """Keeps the locs after every step."""

    def __init__(self, guide):
        self.guide, self.seen = guide, []

    def stopping(self):
        self.seen.append({name: loc.clone() for name, loc in self.guide.locs().items()})
        return False

    def epoch_ended(self, state):
        self.stopping()


def find(model, guide, data, mask=None, epoch=2, weight_decay=0.0):
    mask = mask or {}
    with sparsify(mask):
        posteriors.find_scales_(model, guide, data, mask, epoch=epoch, weight_decay=weight_decay)
    return pl.posterior(guide)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_laplace_has_the_precision_of_a_conjugate_regression(temperature, decay):
    """The posterior of w for y ~ N(w·x, 0.5²) to the power 1/T and w ~ N(0, 2²) has the precision Σx²/0.25/T + 1/4.

    Training with weight decay λ adds N·λ/2·w² to the negative log-likelihood.
    """
    x, net = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), nn.Sequential(nn.Linear(3, 1, bias=False))
    y = x.sum(1, keepdim=True)
    model = pl.BayesianRegressor(net, pl.priors.normal(2.0), num_data=50, noise_scale=0.5, kl_temperature=temperature)
    data = pl.data.from_tensors(x, y, x, y, normalize=False)
    found = find(model, pl.guides.laplace(model), data, weight_decay=decay)
    precision = (x**2).sum(0) / 0.25 / temperature + 0.25 + 50 * decay / temperature
    torch.testing.assert_close(found.scale["0.weight"], precision.rsqrt()[None], rtol=1e-4, atol=1e-6)


def test_laplace_takes_a_part_of_many_examples_for_all(monkeypatch, tiny_data):
    model, guide = tiny(pl.guides.laplace)
    whole = find(model, guide, tiny_data).scale
    monkeypatch.setattr("pyro_lottery.posteriors.found.EXAMPLES", 30)
    part = find(model, guide, tiny_data).scale
    ratios = torch.cat([(part[name] / whole[name]).flatten() for name in whole])
    assert not same(part, whole)
    assert 0.8 < float(ratios.median()) < 1.25


def test_laplace_without_curvature_is_one_line(tiny_data):
    model, guide = tiny(pl.guides.laplace, prior=pl.priors.flat())
    for loc in guide.locs().values():
        loc.zero_()
    with pytest.raises(
        pl.UserError,
        match=r"laplace finds a curvature that is not positive and finite at .* use a prior with curvature",
    ):
        find(model, guide, tiny_data)


def test_when_snapshots_are_taken():
    assert snapshots(75, 100) == 0
    assert [snapshots(done, 100) for done in (76, 77, 99, 100)] == [1, 2, 24, 25]
    taken = [done for done in range(1, 2001) if snapshots(done, 2000) > snapshots(done - 1, 2000)]
    assert len(taken) == snapshots(2000, 2000) == 500 // 16
    assert taken[-1] == 2000
    assert {b - a for a, b in pairwise(taken)} == {16}


def test_swag_is_mean_and_standard_deviation_of_the_last_weights(tiny_data):
    model, guide = tiny(pl.guides.swag)
    hooks = Passing(guide)
    pl.train(model, guide, tiny_data, **QUICK | {"epochs": 4}, hooks=hooks)
    last = {name: torch.stack([one[name] for one in hooks.seen[12:16]]) for name in hooks.seen[0]}
    assert len(hooks.seen) == 16
    before = model.net_state()
    found = find(model, guide, tiny_data, epoch=4)
    for name, values in last.items():
        torch.testing.assert_close(found.loc[name], values.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.scale[name], values.std(0).clamp(min=1e-15), rtol=1e-4, atol=1e-8)
    assert not same(before, model.net_state())


class Drawn:
    """Batches of examples drawn with replacement, whose gradients have independent noise; all examples in order if the batch is as large."""

    def __init__(self, x, y, size):
        self.x, self.y, self.size, self.generator = x, y, size, torch.Generator().manual_seed(1)

    def __len__(self):
        return len(self.x) // self.size

    def __iter__(self):
        for _ in range(len(self)):
            own = torch.randint(len(self.x), (self.size,), generator=self.generator)
            yield (self.x, self.y) if self.size == len(self.x) else (self.x[own], self.y[own])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "epochs", "lr"), [("swag", 16, 50, None), ("sgld", 256, 1500, 0.02), ("sghmc", 256, 1500, 0.02)]
)
def test_samples_meet_a_conjugate_regression(name, size, epochs, lr):
    """Means of 20 weights within a posterior standard deviation each, and variances within a quarter on average.

    The iterates of Adam with the rate η fluctuate around the mode by η·√C/(2H), with the curvature H = 1/σ² of an example and the variance
    C = H/B of a batch's gradient. This is the posterior's variance 1/(N·H) if η = 2σ·√B/N (for SGD: Mandt et al. 2017).
    """
    n, sigma, generator = 512 if lr is None else size, 0.5, torch.Generator().manual_seed(0)
    x = torch.randn(n, 20, generator=generator)
    y = x @ (0.1 * torch.randn(20, 1, generator=generator)) + sigma * torch.randn(n, 1, generator=generator)
    net = nn.Sequential(nn.Linear(20, 1, bias=False))
    nn.init.zeros_(net[0].weight)
    model = pl.BayesianRegressor(net, pl.priors.normal(2.0), num_data=n, noise_scale=sigma)
    guide, data = getattr(pl.guides, name)(model), Drawn(x, y, size)
    lr = lr or 2 * sigma * size**0.5 / n
    pl.train(model, guide, data, epochs=epochs, lr=lr, milestones=(), weight_decay=0.0)
    found = find(model, guide, data, epoch=epochs)
    covariance = torch.linalg.inv(x.T @ x / sigma**2 + torch.eye(20) / 4)
    mean, variance = (covariance @ x.T @ y / sigma**2)[:, 0], covariance.diagonal()
    assert float(((found.loc["0.weight"][0] - mean) / variance.sqrt()).abs().max()) < 1
    assert float((found.scale["0.weight"][0] ** 2 / variance).mean()) == pytest.approx(1, abs=0.25)


def test_batch_norm_has_the_statistics_of_the_data_at_the_new_loc(tiny_data):
    model, guide = tiny(pl.guides.swag)
    pl.train(model, guide, tiny_data, **QUICK)
    found = find(model, guide, tiny_data)  # one batch of all examples
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    x = (tiny_data.train.inputs.float() / 255 - tiny_data.train.mean) / tiny_data.train.std
    h = nn.functional.conv2d(x, found.loc["conv.weight"], found.loc.get("conv.bias"), padding=1)
    torch.testing.assert_close(norm.running_mean, h.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_frozen_batch_norm_keeps_its_statistics(tiny_data):
    model, guide = tiny(pl.guides.swag)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.eval()
    norm.running_mean += 3.0
    before = norm.running_mean.clone()
    pl.train(model, guide, tiny_data, **QUICK)
    find(model, guide, tiny_data)
    assert torch.equal(norm.running_mean, before)


def test_swag_of_a_later_call_collects_in_that_call_alone(tiny_data):
    """Nine epochs, then one, of four steps each, which are the end of the last quarter."""
    model, guide = tiny(pl.guides.swag)
    state = pl.TrainState()
    pl.train(model, guide, tiny_data, **QUICK | {"epochs": 9}, state=state)
    assert guide.taken == snapshots(36, 36) == 9
    hooks = Passing(guide)
    pl.train(model, guide, tiny_data, **QUICK | {"epochs": 1}, state=state, hooks=hooks)
    found = find(model, guide, tiny_data, epoch=10)
    assert guide.taken == len(hooks.seen) == 4
    for name, loc in found.loc.items():
        torch.testing.assert_close(loc, torch.stack([one[name] for one in hooks.seen]).mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guide": "swag", "epochs": 1},
            "swag needs at least two steps in the last quarter of a training, which has 4",
        ),
        ({"guide": "laplace", "prior": "laplace"}, "laplace needs a prior with curvature, such as normal"),
    ],
)
def test_what_could_not_be_found_is_one_line_before_training(options, message, tmp_path):
    with pytest.raises(pl.UserError, match=message):
        small_run(tmp_path / "run", **SHORT | options)
    assert not (tmp_path / "run").exists()


def test_swag_without_snapshots_is_one_line(tiny_data):
    model, guide = tiny(pl.guides.swag)
    with pytest.raises(pl.UserError, match="swag has collected the weights of 0 steps and needs two"):
        find(model, guide, tiny_data)


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_loader_does_for_swag(name, tiny_data):
    model, guide = tiny(getattr(pl.guides, name))
    batches = [(tiny_data.train[i : i + 20], tiny_data.train.targets[i : i + 20]) for i in (0, 20, 40)]
    pl.train(model, guide, batches, **QUICK | {"epochs": 4})
    if name == "laplace":
        with pytest.raises(pl.UserError, match="memory"):
            find(model, guide, batches)
        return
    assert all(bool((scale > 0).all()) for scale in find(model, guide, batches).scale.values())


@pytest.mark.parametrize("rewind", ["epoch:1", "restart:1", "lr"])
@pytest.mark.parametrize("name", NAMES)
def test_every_rewinding_goes_on(name, rewind, tmp_path):
    run = small_run(tmp_path / "run", **SHORT | {"guide": name, "rewind": rewind})
    start = run.level(0).posterior if rewind == "lr" else run.folder.load_rewind_point()[0]
    mask = run.level(1).mask
    assert same(run.level(1).ticket.start.loc, masks.apply(mask, start).loc)
    assert bool((run.level(1).posterior.scale["fc1.weight"][mask["fc1.weight"]] > 0).all())


@pytest.mark.parametrize("name", ["sgld", "sghmc"])
def test_samples_need_moments_from_before(name, tmp_path):
    with pytest.raises(
        pl.UserError, match=f"{name} samples in the last quarter of 8 epochs .* rewind to an earlier epoch"
    ):
        small_run(tmp_path / "run", **SHORT | {"guide": name, "epochs": 8, "rewind": "epoch:6"})
    assert not (tmp_path / "run" / "level_00" / "posterior.safetensors").exists()


def test_columns_are_of_the_posterior_and_not_of_the_point(tmp_path):
    run = small_run(tmp_path / "run", **SHORT | {"guide": "laplace", "levels": 0})
    assert run.results["max_test_accuracy"][0] == run.results["test_accuracy"][0]


def test_the_initial_scales_are_those_of_the_option(tmp_path):
    run = small_run(tmp_path / "run", **SHORT | {"guide": "swag", "levels": 0, "init_scale": 0.5})
    other = small_run(
        tmp_path / "other", **SHORT | {"guide": "mean_field", "levels": 0, "init_scale": 0.5, "epochs": 1}
    )
    assert same(run.level(0).ticket.start.scale, other.level(0).ticket.start.scale)


@pytest.mark.parametrize("name", ["laplace", "swag"])
def test_training_is_that_of_a_point(name, tiny_data, half_mask):
    def trained(make):
        model, guide = tiny(make, prior=pl.priors.normal(1.0))
        with sparsify(half_mask):
            history = pl.train(model, guide, tiny_data, **QUICK)
        return masks.apply(half_mask, pl.posterior(guide)).loc, [row["loss"] for row in history]

    own, losses = trained(getattr(pl.guides, name))
    point, expected = trained(pl.guides.deterministic)
    assert same(own, point)
    assert losses == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_run_scores_prunes_rewinds_and_loads(name, tmp_path):
    run = small_run(tmp_path / "run", **SHORT | {"guide": name})
    level = run.level(1)
    posterior, ticket = level.posterior, level.ticket
    first = run.level(0).posterior
    snr = {n: first.loc[n].abs() / first.scale[n] for n in first.prunable}
    kept = torch.cat([snr[n][ticket.mask[n]] for n in snr])
    assert kept.min() >= torch.cat([snr[n][~ticket.mask[n]] for n in snr]).max()
    for site, mask in ticket.mask.items():
        assert not bool(posterior.loc[site][~mask].any())
        assert bool((posterior.scale[site][mask] > 0).all())
    data, network = run.load_data(), level.load_model()
    draws = network.predict(data.test, 3, seed=1, aggregate=False)
    assert not torch.equal(draws[0], draws[1])
    found = network.predict(data.test, run.config.eval_samples, run.config.seed)
    accuracy = float((found.argmax(1) == data.test.targets).double().mean())
    assert accuracy == pytest.approx(run.results["test_accuracy"][1])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(name, tmp_path, monkeypatch):
    options = SHORT | {"guide": name}
    whole = imp.run_imp(Config(**options, run_dir=str(tmp_path / "whole")))
    config = Config(**options, run_dir=str(tmp_path / "stopped"))
    for asks in (8, 3):  # in the last quarter of level 0, where swag collects, and then again
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(
                LevelHooks, "stopping", lambda self, asked=asked, asks=asks: asked.append(0) or len(asked) >= asks
            )
            with pytest.raises(Stopped):
                imp.run_imp(config)
    assert fingerprint(imp.run_imp(config).folder.path) == fingerprint(whole.folder.path)


def test_a_mask_cannot_move_meanwhile(tmp_path):
    with pytest.raises(
        pl.UserError, match="a mask cannot move while a Laplace guide trains, whose scales are known only after"
    ):
        small_run(
            tmp_path / "run",
            **SHORT | {"guide": "laplace", "schedule": "dynamic", "prune_to": 0.1, "levels": 0, "epochs": 5},
        )


def test_posterior_is_another_name_of_guide():
    from pyro_lottery.runs.cli import parse

    assert parse("x", "y", ["--posterior", "swag"]) == parse("x", "y", ["--guide", "swag"])
    assert math.isclose(parse("x", "y", []).lr, 1e-3)
