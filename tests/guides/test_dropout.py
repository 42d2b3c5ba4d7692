"""Monte Carlo dropout: which weights a draw leaves out, and how a run uses it."""

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery.handlers import sparsify
from tests.support import QUICK, SMALL, same, small_run, tiny


def test_a_draw_leaves_out_whole_inputs_of_all_layers_but_the_first():
    model, guide = tiny(pl.guides.mc_dropout, prior=pl.priors.normal(1.0))
    first, *others = model.prunable
    locs = guide.locs()
    seen = {name: [] for name in others}
    for _ in range(400):
        values = guide()
        assert torch.equal(values[first], locs[first])
        for name in others:
            ratio = (values[name] / locs[name]).transpose(0, 1).flatten(1)
            assert bool((ratio == ratio[:, :1]).all())  # one factor an input
            torch.testing.assert_close(ratio.unique()[-1], torch.tensor(1 / 0.9))
            seen[name].append(ratio[:, 0] > 0)
    for name in others:  # of 400 · inputs draws: the standard error is at most 0.015
        kept = torch.stack(seen[name]).double()
        assert abs(float(kept.mean()) - 0.9) < 0.05
    assert same(
        {name: value for name, value in values.items() if name not in model.prunable},
        {n: v for n, v in locs.items() if n not in model.prunable},
    )


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
    with pytest.raises(pl.UserError, match="needs scales"):
        small_run(tmp_path / "snr", **SMALL | {"guide": "mc_dropout", "levels": 1, "score": "squared_sum"})
