"""Monte Carlo dropout: which weights a draw leaves out, and how a run uses it."""

import copy

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery.handlers import sparsify
from tests.support import QUICK, SMALL, small_run, tiny


def test_a_draw_leaves_out_whole_inputs_of_all_layers_but_the_first():
    _, guide = tiny(pl.guides.mc_dropout, prior=pl.priors.normal(1.0))
    first = next(name for name, shape in guide.shapes.items() if len(shape) > 1)
    locs = guide.locs()
    assert set(guide.dropped) == {name for name, shape in guide.shapes.items() if len(shape) > 1} - {first}
    seen = {name: [] for name in guide.dropped}
    for _ in range(400):
        values = guide()
        for name in guide.shapes.keys() - guide.dropped.keys():
            assert torch.equal(values[name], locs[name])
        for name in guide.dropped:
            ratio = (values[name] / locs[name]).transpose(0, 1).flatten(1)
            assert torch.allclose(ratio, ratio[:, :1])  # one factor an input
            torch.testing.assert_close(ratio[ratio > 0], torch.full_like(ratio[ratio > 0], 1 / 0.9))
            seen[name].append(ratio[:, 0] > 0)
    for kept in seen.values():  # of 400 · inputs draws: the standard error is at most 0.015
        assert abs(float(torch.stack(kept).double().mean()) - 0.9) < 0.05


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4, bias=False), torch.randn(2, 6)),
        (nn.Conv2d(6, 4, 3, bias=False), torch.randn(2, 6, 5, 5)),
        (nn.Conv2d(6, 4, 3, groups=2, bias=False), torch.randn(2, 6, 5, 5)),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), torch.randn(2, 6, 5, 5)),
        (nn.ConvTranspose2d(6, 4, 3, bias=False), torch.randn(2, 6, 5, 5)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), torch.randn(2, 6, 5, 5)),
    ],
)
def test_leaving_out_inputs_of_a_layer_is_dropout_of_its_input(layer, x):
    """The layer with a draw as weights gives what it gives for an input of which whole channels are 0 and the others 1/(1−p) times as large."""
    before = nn.Linear(6, 6) if x.ndim == 2 else nn.Conv2d(6, 6, 1)
    model = pl.BayesianClassifier(nn.Sequential(before, copy.deepcopy(layer)), num_data=4)
    guide = pl.guides.mc_dropout(model, 0.5)
    assert list(guide.dropped) == ["1.weight"]
    torch.manual_seed(0)
    for _ in range(5):
        torch.manual_seed(int(torch.randint(1000, ())))
        state = torch.get_rng_state()
        weight = guide()["1.weight"]
        torch.set_rng_state(state)
        factor = ((torch.rand(6) >= 0.5) / 0.5).view(1, 6, *[1] * (x.ndim - 2))
        expected = layer(x * factor)
        found = torch.func.functional_call(layer, {"weight": weight}, (x,))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_all_inputs_of_attention_are_left_out():
    for more, dropped in (({}, ["in_proj"]), ({"kdim": 6, "vdim": 6}, ["q_proj", "k_proj", "v_proj"])):
        net = nn.ModuleDict(
            {"first": nn.Linear(3, 8), "a": nn.MultiheadAttention(8, 2, **more), "last": nn.Linear(8, 2)}
        )
        guide = pl.guides.mc_dropout(pl.BayesianClassifier(net, num_data=4))
        assert sorted(guide.dropped) == sorted(
            ["a.out_proj.weight", "last.weight", *(f"a.{name}_weight" for name in dropped)]
        )


def test_a_network_of_two_linear_layers_has_dropout_and_one_of_one_layer_is_refused():
    model = pl.BayesianClassifier(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), num_data=4)
    assert list(pl.guides.mc_dropout(model).dropped) == ["2.weight"]
    with pytest.raises(pl.UserError, match="leaves out inputs of layers behind the first, and this network has none"):
        pl.guides.mc_dropout(pl.BayesianClassifier(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), num_data=4))


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5])
def test_a_rate_that_is_no_probability(rate):
    with pytest.raises(pl.UserError, match="the rate of dropout must be between 0 and 1"):
        tiny(lambda model: pl.guides.mc_dropout(model, rate))


def test_gradients_are_those_of_the_weights_that_are_left(half_mask):
    _, guide = tiny(pl.guides.mc_dropout)
    with sparsify(half_mask):
        values = guide()
    sum(value.sum() for value in values.values()).backward()
    gradients = guide.unpack(guide.loc.grad)
    for name, value in values.items():
        kept = value != 0
        expected = 1 / 0.9 if name in guide.dropped else 1.0
        assert torch.allclose(gradients[name][kept], torch.tensor(expected))
        if name in half_mask:
            assert not bool(value[~half_mask[name]].any())
            assert not bool(gradients[name][~half_mask[name]].any())


def test_compressed_training_is_dense_training(tiny_data, half_mask):
    def trained(compress):
        model, guide = tiny(pl.guides.mc_dropout, prior=pl.priors.normal(1.0))
        with sparsify(half_mask):
            if not compress:
                guide.compressed = lambda: sparsify({})
            pl.train(model, guide, tiny_data, **QUICK)
            return guide()

    torch.manual_seed(0)
    one = trained(True)
    torch.manual_seed(0)
    other = trained(False)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_a_run_prunes_by_magnitude_predicts_by_draws_and_exports(tmp_path):
    run = small_run(tmp_path / "run", **SMALL | {"guide": "mc_dropout", "levels": 1})
    assert run.config.score == "magnitude"
    level, data = run.level(1), run.load_data()
    assert level.posterior.scale is None
    first = run.level(0).posterior.loc
    kept = torch.cat([first[name][level.mask[name]].abs() for name in level.mask])
    assert kept.min() >= torch.cat([first[name][~level.mask[name]].abs() for name in level.mask]).max()
    network = level.load_model()
    draws = network.predict(data.test, 3, seed=1, aggregate=False)
    assert not torch.equal(draws[0], draws[1])
    found = network.predict(data.test, run.config.eval_samples, run.config.seed)
    assert float((found.argmax(1) == data.test.targets).double().mean()) == pytest.approx(
        run.results["test_accuracy"][1]
    )
    with pytest.raises(pl.UserError, match="which do not determine guide mc_dropout"):
        level.export(tmp_path / "a", form="draws", format="safetensors")
    with pytest.raises(pl.UserError, match="guide mc_dropout has no variances"):
        level.export(tmp_path / "b", form="moments", format="onnx")
    level.export(tmp_path / "c", form="draws", format="pt2", samples=3)
    card = (tmp_path / "c" / "README.md").read_text()
    assert "deterministic" not in card
    with pytest.raises(pl.UserError, match="needs scales"):
        small_run(tmp_path / "snr", **SMALL | {"guide": "mc_dropout", "levels": 1, "score": "squared_sum"})
