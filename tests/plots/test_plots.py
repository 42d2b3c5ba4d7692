import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest

import pyro_lottery as pl
from experiments.command import FIGURES
from experiments.study.finished import read
from plots import bayesian_vs_deterministic, command, fig1, fig2, fig3, fig4, fig5, fig8, table1
from plots.style import over_seeds
from pyro_lottery import imp
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.resume import open_folder
from tests.runs.made import finish as make_finished
from tests.support import SMALL, small_run


@pytest.fixture(scope="module")
def finished(smoke_study):
    return read(smoke_study)


def test_mean_and_standard_deviation_over_seeds_by_hand():
    frame = pd.DataFrame(
        {"level": [0, 0, 1], "seed": [0, 1, 0], "percent": [100, 100, 40.0], "accuracy": [1.0, 3.0, 5.0]}
    )
    found = over_seeds(frame, "accuracy")
    assert found["mean"].tolist() == [2.0, 5.0]
    assert found["std"][0] == pytest.approx(2**0.5)
    assert np.isnan(found["std"][1]), "one seed has no band"
    assert found["seeds"].tolist() == [2, 1]


@pytest.mark.parametrize("stem", [*FIGURES, "squared_sum"])
def test_every_figure_says_its_protocol_and_data(stem, finished):
    plotted = __import__(f"plots.{stem}", fromlist=["plot"]).plot(finished)
    title = " ".join(plotted.figure.get_suptitle().split())
    for part in ("digits (8×8)", "smoke protocol: 60 training images, 1 epochs a level", "seeds: 1"):
        assert part in title


def test_the_numbers_are_those_of_the_runs(finished, smoke_study):
    table = fig1.plot(finished).table
    rows = table[
        (table["series"] == "Bayesian, squared_sum") & (table["quantity"] == "MACE") & (table["network"] == "lenet")
    ]
    run = pl.load_run(smoke_study / "lenet-digits-mean_field-squared_sum-seed0-smoke")
    assert rows["mean"].tolist() == run.results["mace"].tolist()
    assert rows["percent"].tolist() == pytest.approx((100 * run.results["density"]).tolist())
    moved = fig5.plot(finished).table.query("series == 'transplanted'")
    source = pl.load_run(smoke_study / "lenet-digits-deterministic-magnitude-seed0-smoke" / "transplant")
    assert moved["mean"].tolist() == (100 * source.results["test_accuracy"]).tolist()


def test_the_dense_level_is_a_dashed_line(finished):
    axes = fig1.plot(finished).figure.axes[0]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert len(dashed) == len(solid) == 4
    assert [line.get_ydata()[0] for line in dashed] == [line.get_ydata()[0] for line in solid]


def test_layers_have_the_rise_of_sparsity_with_depth(finished):
    table = fig2.layers(finished).query("arch == 'lenet' and guide == 'mean_field'")
    slope = np.polyfit(range(len(table)), 100 * table["sparsity"], 1)[0]
    assert table["rise"].iloc[0] == pytest.approx(slope * (len(table) - 1))


def test_the_picture_shows_what_each_control_keeps(finished):
    table = fig3.plot(finished).table.set_index("kind")
    assert table["remaining"].nunique() == 1, "all keep the total"
    assert table["remaining_in_layer"]["shuffle_layerwise"] == table["remaining_in_layer"]["ticket"]
    assert table["mask_is_the_tickets"].to_dict() == {
        "ticket": True, "reinit": True, "shuffle_global": False, "shuffle_even": False, "shuffle_layerwise": False,
    }  # fmt: skip


def test_training_times_by_hand():
    base = {"arch": "a", "treatment": "imp", "rewind": "init", "seed": 0}
    rows = [
        base | {"guide": guide, "score": score, "level": level, "train_seconds": seconds}
        for guide, score, times in (("deterministic", "magnitude", (50, 70)), ("mean_field", "snr", (200, 280)))
        for level, seconds in enumerate(times)
    ]
    found = table1.times(pd.DataFrame(rows)).iloc[0]
    assert (found["deterministic_min"], found["bayesian_min"], found["ratio"]) == (1.0, 4.0, 4.0)


def test_transplants_are_those_of_the_paper_and_a_seed_counts_once():
    base = {"treatment": "transplant", "rewind": "init", "guide": "mean_field", "level": 1, "percent": 40.0}
    rows = [
        base | {"score": score, "seed": 0, "run": score, "accuracy": a}
        for score, a in (("magnitude", 77.0), ("random", 16.0))
    ]
    line = next(line for line in fig5.lines(pd.DataFrame(rows)) if line.label == "transplanted")
    assert over_seeds(line.frame, "accuracy")["mean"].tolist() == [77.0]
    with pytest.raises(pl.UserError, match="two runs of seed 0 would be one line: magnitude, random"):
        over_seeds(pd.DataFrame(rows), "accuracy")


def test_a_network_without_what_a_figure_is_about_has_no_panel(finished):
    levels = finished.levels[finished.levels["arch"] == "lenet"]
    assert len(fig8.lines(levels)) == 4
    assert fig8.lines(levels[levels["rewind"] == "init"]) == []
    assert len(fig4.lines(levels, "mean_field")) == 5
    assert fig4.lines(levels[levels["treatment"] == "imp"], "mean_field") == []


def test_runs_side_by_side_are_alike(tmp_path):
    found = {
        name: small_run(tmp_path / name, levels=0, epochs=epochs) for name, epochs in (("a", 1), ("b", 2), ("c", 1))
    }
    paths = {name: str(run.folder.path) for name, run in found.items()}
    bayesian_vs_deterministic.plot([paths["a"], paths["c"]], str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").exists()
    with pytest.raises(
        pl.UserError,
        match=r"a is lenet, digits \(8×8\), 1 epoch a level, and .*b is .* 2 epochs a level; compare runs of",
    ):
        bayesian_vs_deterministic.plot([paths["a"], paths["b"]], str(tmp_path / "y.png"))


def test_equal_runs_give_equal_files(finished, tmp_path):
    first, again = (fig1.plot(finished).save("fig1", tmp_path / name) for name in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_a_figure_is_a_command(smoke_study, tmp_path, refused):
    assert command.main("fig8", [str(smoke_study), "-o", str(tmp_path), "--accuracy", "max_test_accuracy"]) == 0
    assert "maximum test accuracy over epochs" in (tmp_path / "fig8.csv").read_text()
    for arguments, message in [
        ([str(tmp_path / "none")], "is not a folder; name one that contains run folders"),
        ([str(tmp_path)], "holds no finished run"),
        ([str(smoke_study), "--protocol", "paper"], "no finished run with --protocol paper"),
        ([str(smoke_study), "--accuracy", "top5"], "--accuracy top5: choose"),
        ([str(smoke_study), "--arch", "vgg11"], "--arch vgg11: "),
    ]:
        refused(partial(command.main, "fig1"), arguments, message)


def test_runs_that_do_not_belong_together_are_not_drawn_together(tmp_path):
    for name, more in (("a", {}), ("b", {"epochs": 1}), ("c", {"preset": "smoke"})):
        options = SMALL | more | {"levels": 0, "run_dir": str(tmp_path / name)}
        imp.run_imp(
            pl.preset("smoke", arch="lenet", levels=0, run_dir=options["run_dir"])
            if "preset" in more
            else Config(**options)
        )
    with pytest.raises(pl.UserError, match="runs of custom, smoke; choose one with --protocol"):
        read(tmp_path)
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    twice = read(tmp_path, "smoke")
    with pytest.raises(pl.UserError, match="are the same run; keep one of them"):
        twice.levels  # noqa: B018
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(pl.UserError, match=r"b has epochs 1 and .*a 2; they cannot be compared in one figure"):
        read(tmp_path, "custom")
    assert len(read(tmp_path, "smoke").runs) == 1


def test_networks_of_one_protocol_may_differ_in_patches(tmp_path):
    for arch, patch in (("lenet", None), ("vit_tiny", 8)):
        facts = {"data": {"num_classes": 10, "in_channels": 3, "image_size": [32, 32], "num_data": 1, "checksum": 0}}
        folder = RunFolder(tmp_path / arch)
        open_folder(folder, pl.preset("minimal", arch=arch, patch_size=patch).options(), facts)
        make_finished(folder, 0)
    finished = read(tmp_path, "minimal")
    assert "8-pixel patches" in finished.description
    assert finished.archs == ["lenet", "vit_tiny"]
