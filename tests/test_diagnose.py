"""The command on a run whose numbers are known from elsewhere."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import diagnose, diagnostics, masks
from pyro_lottery.posteriors.nuts import Target
from tests.support import small_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("diagnose")
    return [small_run(root / str(seed), seed=seed, levels=1, prune_fraction=0.9) for seed in (0, 1)]


def test_a_row_per_level_and_a_row_per_layer(runs, capsys):
    run, other = runs
    assert diagnose.main([str(run.folder.path), str(other.folder.path)]) == 0
    said = capsys.readouterr().out
    assert "level 1, density 0.1, effective density" in said
    table = pd.read_csv(run.folder.path / "evaluation" / "diagnosis.csv").set_index("level")
    layers = pd.read_csv(run.folder.path / "evaluation" / "diagnosis_layers.csv")
    assert table["density"].tolist() == run.results["density"].tolist()
    assert (table["effective_density"] <= table["density"]).all()
    assert table["effective_density"][0] == 1.0
    level = run.level(1)
    network, data = level.load_model(), run.load_data()
    kl = diagnostics.kl_per_site(network.model, level.posterior, level.mask)
    assert table["kl"][1] == pytest.approx(math.fsum(kl.values()))
    found = network.predictive(data.test, run.config.eval_samples, run.config.seed)
    assert table["epistemic_share"][1] == pytest.approx(float(found.epistemic.mean() / found.total.mean()))
    weights = torch.tensor([level.mask[name].numel() for name in level.mask])
    effective = torch.tensor(layers[layers["level"] == 1]["effective_density"].to_numpy())
    assert float((effective * weights).sum() / weights.sum()) == pytest.approx(table["effective_density"][1])
    overlap = pl.compare(level.ticket, other.level(1).ticket).iloc[-1]
    assert table["jaccard"][1] == pytest.approx(overlap["jaccard"])
    assert table["chance"][1] == pytest.approx(overlap["chance"])
    assert math.isnan(table["barrier_nll"][0])
    assert table["barrier_nll"][1] >= 0
    assert table["barrier_free_energy"][1] >= 0
    assert masks.density(level.mask) == table["density"][1]


def test_scales_that_stay_are_warned_of(runs, tmp_path, capsys):
    run = small_run(tmp_path / "run", levels=0, epochs=1, lr=1e-6)
    assert diagnose.main([str(run.folder.path), "--no-barriers"]) == 0
    assert "warning: level 0: 0.00% of the scales left their start" in capsys.readouterr().out


def test_warnings_name_empty_layers_and_weights_without_effect():
    row = {"level": 3, "density": 0.1, "effective_density": 0.05, "scales_moved": 0.5}
    layers = [{"level": 3, "site": "a", "density": 0.0}, {"level": 3, "site": "b", "density": 0.2}]
    lines = list(diagnose.warnings_of({"diagnosis": [row], "diagnosis_layers": layers}))
    assert lines == [
        "level 3: 50% of its weights lie on no path from input to output",
        "level 3: no weight is left of 'a'",
    ]
    lines = list(diagnose.warnings_of({"diagnosis": [row | {"effective_density": 0.0}], "diagnosis_layers": []}))
    assert lines == ["level 3: no weight that can be pruned lies on a path from input to output"]


def test_a_point_guide_has_no_columns_of_scales(tmp_path, capsys):
    run = small_run(tmp_path / "run", levels=1, guide="deterministic")
    tables = diagnose.diagnose(run)
    row = tables["diagnosis"][1]
    assert math.isnan(row["scales_moved"])
    assert math.isnan(row["kl"])
    assert math.isnan(row["barrier_free_energy"])
    assert 0 < row["signs_kept"] <= 1
    assert row["barrier_nll"] >= 0


def another(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))


def test_other_networks_and_levels_are_one_line(runs, tmp_path, refused):
    other = small_run(tmp_path / "other", levels=1, arch="tests.test_diagnose:another")
    refused(
        diagnose.main, [str(runs[0].folder.path), str(other.folder.path), "--trust-code"], "has another network than"
    )
    refused(diagnose.main, [str(runs[0].folder.path), "--levels", "7"], "--levels 7: not a finished level of")


def test_a_barrier_is_to_the_level_before_whatever_is_chosen(tmp_path):
    run = small_run(tmp_path / "run", levels=2)
    every = diagnose.diagnose(run)["diagnosis"]
    assert diagnose.diagnose(run, levels=[0, 2])["diagnosis"][1]["barrier_nll"] == every[2]["barrier_nll"]


def test_one_draw_does_not_say_how_far_draws_differ(tmp_path):
    run = small_run(tmp_path / "run", levels=0, eval_samples=1)
    assert math.isnan(diagnose.diagnose(run)["diagnosis"][0]["epistemic_share"])


def layers_that_standardise(num_classes):
    class StdConv(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
            return nn.functional.conv2d(x, w, self.bias)

    return nn.Sequential(
        StdConv(1, 8, 3), nn.ReLU(), StdConv(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes)
    )


def test_layers_that_standardise_their_weights_are_those_of_the_level(tmp_path):
    """The loss at the barrier's end, and the network that NUTS samples, are those of the level at its loc."""
    run = small_run(
        tmp_path / "run", levels=1, prune_fraction=0.7, arch="tests.test_diagnose:layers_that_standardise", epochs=3
    )
    level = run.level(1)
    network, test = level.load_model(), run.load_data().test
    with network.pruned():
        expected = pl.metrics.nll(pl.predict_mean(network.model, network.guide, test), test.labels)
    found = diagnose._nll(network.model, level.posterior.loc, test[:], test.labels)
    assert found == pytest.approx(expected, rel=1e-4)
    target = Target(network.model, level.posterior, level.mask, run.load_data().train)
    outputs = target.outputs(target.values(target.flat(level.posterior.loc)), test[:])
    assert pl.metrics.nll(outputs.softmax(1), test.labels) == pytest.approx(expected, rel=1e-4)


def test_the_free_energy_barrier_counts_the_kl_of_the_survivors_alone(tmp_path):
    """With scales that are nearly 0, it is that of the NLL at loc minus T/N · t(1 − t)/2 · Σ Δm² over the survivors (prior N(0, 1))."""
    run = small_run(
        tmp_path / "run",
        levels=1,
        prune_fraction=0.9,
        init_scale=1e-4,
        epochs=8,
        lr=0.03,
        kl_temperature=1e-3,
        milestones=(),
    )
    row = diagnose.diagnose(run)["diagnosis"][1]
    before, level = run.level(0), run.level(1)
    model, test = level.load_model().model, run.load_data().test
    few, _ = pl.data.stratified_split(test, min(diagnose.EXAMPLES, len(test)), seed=0)
    change = [
        (level.posterior.loc[n] - before.posterior.loc[n])[level.mask.get(n, torch.ones_like(loc, dtype=torch.bool))]
        for n, loc in level.posterior.loc.items()
    ]
    square = sum(float(c.square().sum()) for c in change)
    losses, gains = [], []
    for i in range(diagnose.POINTS):
        t = i / (diagnose.POINTS - 1)
        loc = {n: v.lerp(level.posterior.loc[n], t) for n, v in before.posterior.loc.items()}
        losses.append(diagnose._nll(model, loc, few[:], few.labels))
        gains.append(run.config.kl_temperature / model.num_data * t * (1 - t) / 2 * square)
    chord = [losses[0] + i / (diagnose.POINTS - 1) * (losses[-1] - losses[0]) for i in range(diagnose.POINTS)]
    nll = max(a - b for a, b in zip(losses, chord, strict=True))
    assert row["barrier_nll"] == pytest.approx(nll, abs=1e-4)
    expected = max(a - b - gain for a, b, gain in zip(losses, chord, gains, strict=True))
    assert expected > 0.02, "there is a barrier"
    assert row["barrier_free_energy"] == pytest.approx(expected, rel=0.1, abs=2e-3)
