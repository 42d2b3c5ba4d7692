"""The command on a run whose numbers are known from elsewhere."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import diagnose, diagnostics, masks
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
    assert lines == ["level 3: no weight lies on a path from input to output; its outputs do not depend on the input"]


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
