import pytest

import pyro_lottery as pl
from pyro_lottery import controls, tables, transplant
from tests.support import small_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for guide in ("mean_field", "deterministic"):
        run = small_run(root / guide, guide=guide)
    controls.run_control(run, "shuffle_even", [2])
    transplant.transplant_run(run, [1])
    (root / "figures").mkdir()
    return root


def test_one_row_per_finished_level_with_its_treatment(root):
    frame = tables.levels(tables.list_runs(root))
    counts = frame.groupby(["treatment", "guide"])["level"].apply(list).to_dict()
    assert counts == {
        ("imp", "deterministic"): [0, 1, 2],
        ("imp", "mean_field"): [0, 1, 2],
        ("shuffle_even", "deterministic"): [2],
        ("transplant", "mean_field"): [1],
    }
    run = pl.load_run(root / "mean_field")
    own = frame[frame["run"] == str(root / "mean_field")]
    assert own["nll"].tolist() == run.results["nll"].tolist()
    assert set(own["score"]) == {"snr"}


def test_layers_are_those_of_the_mask_by_depth(root):
    run = pl.load_run(root / "mean_field")
    frame = tables.layers([run])
    mask = run.level(2).ticket.mask
    assert frame["site"].tolist() == list(mask)
    assert frame["depth"].tolist() == list(range(1, len(mask) + 1))
    assert frame["density"].tolist() == list(pl.masks.density_per_site(mask).values())
    assert (frame["weights"] * frame["density"]).sum() == pytest.approx(pl.masks.remaining(mask))
    assert tables.layers([run], 0)["density"].tolist() == [1.0] * len(mask)


def test_runs_made_from_tickets_are_no_runs_of_pruning(root):
    assert [run.folder.path.name for run in tables.list_runs(root)] == ["deterministic", "mean_field"]
    assert tables.list_runs(root / "deterministic" / "controls") == []


def test_a_missing_folder_is_named(tmp_path):
    assert tables.list_runs(tmp_path) == []
    assert list(tables.levels([])["level"]) == []
    with pytest.raises(pl.UserError, match="is not a folder; name one that contains run folders"):
        tables.list_runs(tmp_path / "none")
