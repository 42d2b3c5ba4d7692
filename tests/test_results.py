import json

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import files
from pyro_lottery.results import LevelFolder, RunFolder
from pyro_lottery.types import LevelResult, Posterior, Ticket

OPTIONS = {"arch": "lenet", "levels": 2, "milestones": (3, 4), "seed": 0, "run_dir": "x", "epochs": 5}


def ticket():
    # Names that do not sort the way the network orders them.
    loc = {"b10.weight": torch.randn(2, 3), "a.bias": torch.randn(2), "b9.weight": torch.randn(4)}
    scale = {n: t.exp() for n, t in loc.items()}
    mask = {"b10.weight": torch.rand(2, 3) > 0.5, "b9.weight": torch.rand(4) > 0.5}
    return Ticket(mask, Posterior(loc, scale, tuple(mask)), {"bn.running_mean": torch.randn(2)})


def test_files_hold_the_names_that_others_rely_on(tmp_path):
    folder = LevelFolder(tmp_path / "level_03")
    saved = ticket()
    folder.save_ticket(saved)
    tensors, _ = files.load_tensors(tmp_path / "level_03" / "ticket.safetensors")
    assert tensors["mask/b10.weight"].dtype == torch.uint8
    assert set(tensors["mask/b10.weight"].unique().tolist()) <= {0, 1}
    assert {name.split("/")[0] for name in tensors} == {"mask", "loc", "scale", "net"}
    folder.save_posterior(Posterior(saved.start.loc, None, saved.start.prunable), saved.net)
    tensors, _ = files.load_tensors(tmp_path / "level_03" / "posterior.safetensors")
    assert {name.split("/")[0] for name in tensors} == {"loc", "net"}, "a deterministic run has no scale/"
    assert folder.load_posterior()[0].scale is None


def row(level):
    return LevelResult(level, 0.8**level, 80, 100, 0.5, 0.6, None, 1.25, 0.1, 0.2, 0.3, 12.5, 3.25)


def opened(path, options=None, facts=None):
    run = RunFolder(path)
    run.open(options or OPTIONS, facts or {})
    return run


def test_results_round_trip_and_have_the_promised_columns(tmp_path):
    run = opened(tmp_path / "run")
    assert run.results() == []
    for level in range(3):
        run.add_result(row(level))
    assert run.results() == [row(level) for level in range(3)]
    header = (tmp_path / "run" / "results.csv").read_text().splitlines()[0]
    promised = "level,density,remaining,total,test_accuracy,max_test_accuracy,val_accuracy,nll,mace,ece,brier,train_seconds,step_ms"
    assert header.startswith(promised)


def test_a_run_folder_keeps_its_options(tmp_path):
    path = tmp_path / "run"
    opened(path, OPTIONS, {"versions": {"torch": "1"}})
    assert json.loads((path / "config.json").read_text())["versions"] == {"torch": "1"}
    opened(path, OPTIONS | {"run_dir": "elsewhere"})
    with pytest.raises(pl.UserError, match="epochs is 5 there and 6 here"):
        opened(path, OPTIONS | {"epochs": 6})
    with pytest.raises(pl.UserError, match=r"milestones is \[3, 4\] there and \[3\] here"):
        opened(path, OPTIONS | {"milestones": (3,)})
    assert opened(path, OPTIONS | {"levels": 5}).config["levels"] == 5
    assert opened(path, OPTIONS | {"levels": 1}).config["levels"] == 5


def test_nothing_foreign_is_written_into(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("do not touch")
    with pytest.raises(pl.UserError, match="not empty and holds no run"):
        opened(tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(pl.UserError, match="is a file"):
        opened(tmp_path / "file")
    with pytest.raises(pl.UserError, match=r"no config\.json"):
        RunFolder(tmp_path / "none").config  # noqa: B018
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.tex"]


def test_other_data_are_noticed(tmp_path):
    opened(tmp_path, OPTIONS | {"data_dir": "a"}, {"data": {"checksum": 1}})
    with pytest.raises(pl.UserError, match="trained on other data than --data-dir b holds"):
        opened(tmp_path, OPTIONS | {"data_dir": "b"}, {"data": {"checksum": 2}})


def test_one_process_at_a_time(tmp_path):
    refused = pytest.raises(pl.UserError, match="another process is at work")
    with RunFolder(tmp_path).lock(), refused, RunFolder(tmp_path).lock():
        pass
    with RunFolder(tmp_path).lock():
        pass


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".config.json.1234.tmp").write_text("{")  # killed during the very first write
    run = opened(tmp_path)
    run.level(0).save_checkpoint({"x": torch.ones(1)}, {})
    (tmp_path / "level_00" / ".checkpoint.safetensors.99.tmp").write_bytes(b"half")
    run.add_result(row(0))  # killed before the finished level's checkpoints went
    opened(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "level_00", "results.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{}", "lacks the option"),
        ("config.json", "[]", "is not a JSON object"),
        ("config.json", "{", "is not JSON"),
        ("results.csv", "level,density\n0,x\n", "is not a table of levels"),
        ("results.csv", "density\n1.0\n", "is not a table of levels"),
    ],
)
def test_damaged_text_is_named(tmp_path, name, content, message):
    opened(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(pl.UserError, match=message):
        opened(tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    folder = LevelFolder(tmp_path)
    assert folder.load_checkpoint() is None
    for epoch in (1, 2, 3):
        folder.save_checkpoint({"x": torch.full((3,), float(epoch))}, {"epoch": epoch})
    assert folder.load_checkpoint()[1] == {"epoch": 3}
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint\.safetensors .*going on from the checkpoint before"):
        tensors, info = folder.load_checkpoint()
    assert info == {"epoch": 2}
    assert tensors["x"][0] == 2
    folder.drop_checkpoints()
    assert list(tmp_path.iterdir()) == []
