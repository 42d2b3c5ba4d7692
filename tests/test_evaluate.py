import pandas as pd
import pytest

import pyro_lottery as pl
from pyro_lottery import data, evaluate, imp
from pyro_lottery.runs.card import detections
from pyro_lottery.runs.config import Config
from tests.support import cifar10_c, cifar10_jpeg, small_run


@pytest.fixture(scope="module", params=["mean_field", "deterministic"])
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return small_run(path, guide=request.param, levels=1, epochs=3)


@pytest.fixture(scope="module")
def tables(run):
    return evaluate.evaluate(run, ood=["noise", "permuted"], corruptions=True)


def test_the_metrics_are_those_of_the_run(run, tables):
    for row, level in zip(tables["uncertainty"], run.results.itertuples(), strict=True):
        assert (row["accuracy"], row["nll"], row["mace"]) == (level.test_accuracy, level.nll, level.mace)
        assert row["total"] == pytest.approx(row["aleatoric"] + row["epistemic"])
    samples = [row for row in tables["samples"] if row["level"] == 1]
    assert [row["samples"] for row in samples] == ([1, 2] if run.config.guide == "mean_field" else [1])
    assert samples[-1]["nll"] == tables["uncertainty"][1]["nll"]


def test_selective_prediction_ends_at_the_accuracy(run, tables):
    for level in (0, 1):
        rows = [row for row in tables["selective"] if row["level"] == level]
        assert rows[-1]["coverage"] == 1.0
        assert rows[-1]["accuracy"] == pytest.approx(run.results["test_accuracy"][level])


def test_accuracies_by_class_sum_up_to_the_accuracy(run, tables):
    labels = run.load_data().test.labels
    for uncertain in tables["uncertainty"]:
        rows = [row for row in tables["classes"] if row["level"] == uncertain["level"]]
        assert [row["class"] for row in rows] == list("0123456789") == list(run.classes)
        assert [row["images"] for row in rows] == labels.bincount(minlength=10).tolist()
        assert sum(row["predicted"] for row in rows) == len(labels)
        right = sum(row["images"] * row["accuracy"] for row in rows)
        assert right / len(labels) == pytest.approx(uncertain["accuracy"])


def test_the_reliability_diagram_sums_up_to_the_errors(run, tables):
    for uncertain in tables["uncertainty"]:
        rows = [row for row in tables["reliability"] if row["level"] == uncertain["level"]]
        gaps = [abs(row["accuracy"] - row["confidence"]) for row in rows]
        count = sum(row["images"] for row in rows)
        assert count == len(run.load_data().test)
        assert sum(gaps) / len(gaps) == pytest.approx(uncertain["mace"])
        ece = sum(gap * row["images"] / count for gap, row in zip(gaps, rows, strict=True))
        assert ece == pytest.approx(uncertain["ece"], abs=1e-6)


def test_the_histogram_counts_every_image_and_has_the_mean_entropy(run, tables):
    for level, images in {(row["level"], row["images"]) for row in tables["histogram"]}:
        rows = [row for row in tables["histogram"] if (row["level"], row["images"]) == (level, images)]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert images in ("test", "noise", "permuted")
        if images == "test":
            width = rows[1]["entropy"] - rows[0]["entropy"]
            mean = sum(row["share"] * row["entropy"] for row in rows)
            assert mean == pytest.approx(tables["uncertainty"][level]["total"], abs=width / 2)


def test_other_images_and_corruptions_have_a_row_each(run, tables):
    assert {(r["ood"], r["score"]) for r in tables["ood"]} == {
        (name, score) for name in ("noise", "permuted") for score in ("total", "aleatoric", "epistemic", "confidence")
    }
    assert len(tables["corruptions"]) == 2 * 5 * 5
    if run.config.guide == "deterministic":
        assert {r["auroc"] for r in tables["ood"] if r["score"] == "epistemic"} == {0.5}, "a point has no such doubt"


def test_tables_and_pictures_are_written(run, tables):
    folder = run.folder.path / "evaluation"
    for name, rows in tables.items():
        assert len(pd.read_csv(folder / f"{name}.csv")) == len(rows)
        assert (folder / f"{name}.png").stat().st_size > 5000


def test_levels_are_added_to_what_is_there(run, tables):
    evaluate.evaluate(run, [0], samples=1, ood=["noise"])
    folder = run.folder.path / "evaluation"
    found = pd.read_csv(folder / "uncertainty.csv")
    assert list(found["level"]) == [0, 1]
    assert list(found["num_samples"]) == ([1, 2] if run.config.guide == "mean_field" else [1, 1])
    assert found["nll"][1] == pytest.approx(tables["uncertainty"][1]["nll"])
    assert set(pd.read_csv(folder / "corruptions.csv")["level"]) == {0, 1}


def test_the_command(run, capsys, refused):
    assert evaluate.main([str(run.folder.path), "--levels", "1", "--samples", "3"]) == 0
    drawn = 3 if run.config.guide == "mean_field" else 1
    assert f"level 1, density 0.8, num_samples {drawn}, accuracy " in capsys.readouterr().out
    for arguments, message in [
        (["--levels", "7"], "--levels 7: "),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--ood", "svhn"], "has no complete copy of SVHN"),
        (["--ood", "digits"], "--ood digits: the run was trained on these images; choose others"),
        (["--ood", "cats"], "unknown --ood 'cats'"),
    ]:
        refused(evaluate.main, [str(run.folder.path), *arguments], message)
    with pytest.raises(pl.UserError, match="is not a run folder"):
        pl.load_run("/nowhere")


def test_a_baseline_is_the_confidence_of_another_run(run, tmp_path):
    other = small_run(tmp_path / "other", guide="deterministic", levels=1, epochs=2)
    rows = evaluate.evaluate(run, [1], ood=["noise"], baseline=other)["ood"]
    (found,) = (row for row in rows if row["score"] == "baseline")
    (own,) = (row for row in evaluate.evaluate(other, [1], ood=["noise"])["ood"] if row["score"] == "confidence")
    assert found == own | {"score": "baseline"}
    assert found["auroc"] not in {row["auroc"] for row in rows if row["score"] != "baseline"}
    kept = pd.read_csv(run.folder.path / "evaluation" / "ood.csv")
    assert (kept["score"] == "baseline").sum() == 1
    assert not kept.isna().any(axis=None)
    assert "baseline" not in {row["score"] for row in detections(run.level(1))}


def test_a_baseline_of_other_images_or_densities_is_refused(run, tmp_path, refused):
    def message(**options):
        other = small_run(
            tmp_path / str(len(list(tmp_path.iterdir()))), guide="deterministic", **{"levels": 1, "epochs": 1} | options
        )
        refused(evaluate.main, [str(run.folder.path), "--ood", "noise", "--baseline", str(other.folder.path)], expected)

    expected = "its level 1 has 70.0%; give a run whose level 1 has 80.0% of the weights"
    message(prune_fraction=0.3)
    expected = "its level 1 is not finished"
    message(levels=0)
    expected = "its test images are not those of"
    message(test_size=30)
    expected = "it is a resnet20; give a run of lenet"
    message(arch="resnet20", levels=0)
    refused(evaluate.main, [str(run.folder.path), "--baseline", str(run.folder.path)], "give --ood too")


def test_a_run_of_cifar10_sees_the_files_of_cifar10_c(tmp_path):
    root = cifar10_jpeg(tmp_path / "data")
    options = {
        "dataset": "folder",
        "data_dir": str(root),
        "levels": 0,
        "epochs": 1,
        "batch_size": 10,
        "eval_samples": 2,
    }
    run = pl.load_run(
        imp.run_imp(Config(arch="lenet", milestones=(), run_dir=str(tmp_path / "run"), **options)).folder.path
    )
    own = evaluate.evaluate(run, corruptions=True)["corruptions"]
    assert {row["corruption"] for row in own} == set(data.CORRUPTIONS)
    cifar10_c(root)
    rows = evaluate.evaluate(run, corruptions=True)["corruptions"]
    assert [(row["corruption"], row["severity"]) for row in rows] == [
        (k, s) for k in ("fog", "jpeg_compression") for s in range(1, 6)
    ]
    assert {row["source"] for row in own} | {row["source"] for row in rows} == {"pyro_lottery", "CIFAR-10-C"}
    seen = data.from_cifar10_c(run.load_data().test, root, "fog", 4)
    probs = run.level(0).load_model().predict(seen, 2, run.config.seed)
    assert rows[3]["nll"] == pl.metrics.nll(probs, seen.labels)


def test_a_figure_shows_levels_of_one_number_of_draws(run, tmp_path, monkeypatch):
    if run.config.guide == "deterministic":
        pytest.skip("it has one draw")
    shown = {}
    monkeypatch.setattr(evaluate, "plot_evaluation", lambda folder, tables: shown.update(tables))
    evaluate.evaluate(run, samples=3)
    evaluate.evaluate(run, levels=[1], samples=4)
    assert {(row["level"], row["num_samples"]) for row in shown["uncertainty"]} == {(1, 4)}
    evaluate.evaluate(run, levels=[0], samples=4)
    assert {row["level"] for row in shown["uncertainty"]} == {0, 1}


def test_other_images_of_a_level_are_kept(run):
    evaluate.evaluate(run, levels=[1], samples=2, ood=["noise", "permuted"])
    evaluate.evaluate(run, levels=[1], samples=2, ood=["noise"])
    kept = pd.read_csv(run.folder.path / "evaluation" / "ood.csv")
    assert set(kept[kept["level"] == 1]["ood"]) == {"noise", "permuted"}
    assert not kept.duplicated(["level", "ood", "score"]).any()
    kept = pd.read_csv(run.folder.path / "evaluation" / "histogram.csv")
    assert set(kept[kept["level"] == 1]["images"]) == {"test", "noise", "permuted"}


def test_one_test_image_has_all_measures_but_that_of_a_fitted_temperature(tmp_path):
    run = small_run(tmp_path / "run", levels=0, epochs=1, test_size=1)
    (row,) = evaluate.evaluate(run)["uncertainty"]
    missing = [name for name, value in row.items() if value != value]
    assert missing == ["calibrated_nll"]
