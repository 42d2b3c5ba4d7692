import math
import os

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import files, untrusted, weights
from pyro_lottery.errors import Damaged
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.level_folder import LevelFolder
from pyro_lottery.types import Posterior, infinite_info
from tests.runs.made import OPTIONS, finish, opened, replace_text, row, truncate
from tests.support import ticket


def test_files_hold_the_names_that_others_rely_on(tmp_path):
    folder = LevelFolder(tmp_path / "level_03")
    saved = ticket()
    folder.save_ticket(saved)
    tensors, _ = untrusted.load_tensors(tmp_path / "level_03" / "ticket.safetensors")
    assert tensors["mask/b10.weight"].dtype == torch.uint8
    assert set(tensors["mask/b10.weight"].unique().tolist()) <= {0, 1}
    assert {name.split("/")[0] for name in tensors} == {"mask", "loc", "scale", "net"}
    folder.save_posterior(Posterior(saved.start.loc, None, saved.start.prunable), saved.net)
    tensors, _ = untrusted.load_tensors(tmp_path / "level_03" / "posterior.safetensors")
    assert {name.split("/")[0] for name in tensors} == {"loc", "net"}, "a deterministic run has no scale/"
    assert folder.load_posterior()[0].scale is None


def test_a_pipe_is_not_waited_for(tmp_path):
    run = opened(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(pl.UserError, match="not a regular file"):
        run.config  # noqa: B018
    os.mkfifo(tmp_path / "t.safetensors")
    with pytest.raises(OSError, match="not a regular file"):
        untrusted.load_tensors(tmp_path / "t.safetensors")
    with pytest.raises(pl.UserError, match="not a regular file"):
        weights.load(tmp_path / "t.safetensors")


def test_a_checkpoint_that_cannot_be_verified_replaces_none(tmp_path, monkeypatch):
    folder = LevelFolder(tmp_path)
    for epoch in (1, 2):
        folder.save_checkpoint({"x": torch.ones(3)}, {"epoch": epoch})
    write = files.write_atomic
    monkeypatch.setattr(files, "write_atomic", lambda path, data: write(path, data[:-1]))
    with pytest.raises(Damaged, match=r"checkpoint\.new"):
        folder.save_checkpoint({"x": torch.ones(3)}, {"epoch": 3})
    assert [untrusted.load_tensors(p)[1]["epoch"] for p in (folder.checkpoint, folder.checkpoint_before)] == [2, 1]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    folder = LevelFolder(tmp_path)
    assert folder.load_checkpoint() is None
    for epoch in (1, 2, 3):
        folder.save_checkpoint({"x": torch.full((3,), float(epoch))}, {"epoch": epoch})
    assert folder.load_checkpoint()[1] == {"epoch": 3}
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint\.safetensors .*training resumes from the checkpoint before"):
        tensors, info = folder.load_checkpoint()
    assert info == {"epoch": 2}
    assert tensors["x"][0] == 2
    folder.drop_checkpoints()
    assert list(tmp_path.iterdir()) == []


def test_a_link_within_a_run_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = opened(tmp_path / "run")
    (tmp_path / "run" / "evaluation").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(pl.UserError, match="evaluation is a symbolic link"):
        run.derived("evaluation")


def test_a_checkpoint_may_hold_an_attention_masks_infinite_numbers_and_no_others(tmp_path):
    folder = LevelFolder(tmp_path)
    for tensors, whole in (
        ({"net/attention_mask": torch.tensor([-math.inf])}, True),
        ({"net/attention_mask": torch.tensor([math.nan])}, False),
        ({"guide/loc": torch.tensor([-math.inf])}, False),
    ):
        folder.save_checkpoint(tensors, infinite_info(tensors))
        if whole:
            assert torch.equal(folder.load_checkpoint()[0]["net/attention_mask"], tensors["net/attention_mask"])
        else:
            with pytest.warns(UserWarning, match="not finite"):
                folder.load_checkpoint()
        folder.drop_checkpoints()


def test_files_of_others_are_not_touched(tmp_path):
    folder, victim = tmp_path / "home", tmp_path / "victim"
    (folder / "docs").mkdir(parents=True)
    for path in (folder / ".important.tmp", folder / "docs" / ".thesis.123.tmp", victim):
        path.write_text("mine")
    with pytest.raises(pl.UserError, match="not empty and is not a run folder"):
        opened(folder)
    run = opened(tmp_path / "run")
    control = run.derived("controls", "reinit").path
    control.mkdir(parents=True)
    (control / ".results.csv.77.tmp").write_text("being written by the control's process")
    (run.path / ".owner").symlink_to(victim)
    with run.lock():
        opened(tmp_path / "run").drop_leftovers()
    kept = [folder / ".important.tmp", folder / "docs" / ".thesis.123.tmp", control / ".results.csv.77.tmp", victim]
    assert [p.read_text()[:4] for p in kept] == ["mine", "mine", "bein", "mine"]


def test_results_are_those_of_the_manifests_and_have_the_promised_columns(tmp_path):
    run, table = opened(tmp_path), tmp_path / "results.csv"
    assert run.results() == []
    for level in (2, 0, 1):
        finish(run, level)
    assert run.results() == [row(level) for level in range(3)]
    run.write_results()
    header, *lines = table.read_text().splitlines()
    assert header == (
        "level,density,remaining,total,test_accuracy,max_test_accuracy,val_accuracy,nll,mace,ece,brier,train_seconds,step_ms,"
        "selected_test_accuracy,rmse,val_rmse,coverage_50,coverage_80,coverage_95,predict_ms,flops"
    )
    assert lines[1] == "1,0.6,6,10,0.5,0.6,,1.25,0.1,0.2,0.3,12.5,3.25,,,,,,,,"


@pytest.mark.parametrize("change", ["", "level,thesis\n0,1\n", None])
def test_a_table_that_was_changed_is_written_anew(tmp_path, change):
    run, table = opened(tmp_path), tmp_path / "results.csv"
    finish(run, 0)
    run.write_results()
    before, written = table.read_bytes(), table.stat().st_mtime_ns
    run.write_results()
    assert table.stat().st_mtime_ns == written, "it is left alone while it is right"
    table.unlink() if change is None else table.write_text(change)
    assert run.results() == [row(0)]
    run.write_results()
    assert table.read_bytes() == before


def test_a_level_without_a_manifest_is_not_finished(tmp_path):
    run = opened(tmp_path)
    for level in range(2):
        finish(run, level)
    run.write_results()
    (run.level(1).path / "level.json").unlink()
    assert run.results() == [row(0)]
    assert run.level(1).check(OPTIONS["epochs"]) is None


DAMAGES = {
    "half a posterior": lambda level: truncate(level.path / "posterior.safetensors"),
    "no ticket": lambda level: (level.path / "ticket.safetensors").unlink(),
    "another mask": lambda level: level.save_ticket(ticket(kept=5)),
    "an epoch less": lambda level: level.save_history([{"epoch": 1.0, "loss": 2.0}] * 4),
    "a changed loss": lambda level: replace_text(level.path / "history.csv", "2.0", "1.0"),
    "a changed row": lambda level: replace_text(level.path / "level.json", "0.5", "0.9"),
    "half a manifest": lambda level: truncate(level.path / "level.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_level_whose_files_are_not_those_of_its_manifest_is_damaged(damage, tmp_path):
    level = opened(tmp_path).level(1)
    finish(RunFolder(tmp_path), 1)
    assert level.check(OPTIONS["epochs"]).result == row(1)
    DAMAGES[damage](level)
    with pytest.raises(Damaged, match="level_01"):
        level.check(OPTIONS["epochs"])


def another_mask(level):
    level.save_ticket(ticket(kept=5))


def other_sites(level):
    posterior, net = level.load_posterior()
    loc = {name: value for name, value in posterior.loc.items() if name != "a.bias"}
    scale = {name: posterior.scale[name] for name in loc}
    level.save_posterior(Posterior(loc, scale, posterior.prunable), net)


def pruned_weights_that_are_not_0(level):
    start = level.load_ticket().start
    level.save_posterior(Posterior({n: torch.ones_like(v) for n, v in start.loc.items()}, None, start.prunable), {})


def an_epoch_less(level):
    level.save_history([{"epoch": 1.0, "loss": 2.0}] * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_mask, "keeps 5 of 10 weights, its row 6 of 10"),
        (other_sites, "other sites than its ticket"),
        (pruned_weights_that_are_not_0, "weights that its mask prunes"),
        (an_epoch_less, "has 4 of 5 epochs"),
    ],
)
def test_files_that_do_not_agree_are_damage_though_the_checksums_are_right(change, message, tmp_path):
    """Whoever changes a file can write its checksum, too."""
    run = opened(tmp_path)
    finish(run, 0)
    level = run.level(0)
    change(level)
    level.finish(row(0), 7)
    with pytest.raises(Damaged, match=message):
        level.check(OPTIONS["epochs"])


def test_a_manifest_that_lists_files_elsewhere_is_damaged(tmp_path):
    run = opened(tmp_path)
    finish(run, 0)
    level = run.level(0)
    manifest = level.manifest()
    type(manifest)(row(0), 7, {**manifest.files, "../../secret": "00000000"}).save(level.path / "level.json")
    with pytest.raises(Damaged, match=r"level\.json lists .*\.\./\.\./secret; expected ticket\.safetensors, posterior"):
        level.check(OPTIONS["epochs"])


def test_a_manifest_of_another_level_is_named(tmp_path):
    run = opened(tmp_path)
    finish(run, 0)
    run.level(0).path.rename(run.level(1).path)
    with pytest.raises(pl.UserError, match=r"level_01/level\.json is the manifest of level 0"):
        run.results()


def test_whoever_reads_a_run_is_told_of_a_damaged_manifest(tmp_path):
    run = opened(tmp_path)
    finish(run, 0)
    truncate(run.level(0).path / "level.json")
    with pytest.raises(
        pl.UserError, match=r"level\.json is not JSON .*; run the command of this run again to train the level again"
    ):
        run.results()


def test_a_late_rewind_point_is_part_of_level_0(tmp_path):
    run = opened(tmp_path, OPTIONS | {"rewind": "epoch:1"})
    run.rewind_point.save_posterior(ticket().start, {})
    finish(run, 0, rewind=True)
    assert run.level(0).check(OPTIONS["epochs"])
    truncate(run.rewind_point.path / "posterior.safetensors")
    with pytest.raises(Damaged, match=r"rewind.*does not have the checksum"):
        run.level(0).check(OPTIONS["epochs"])
    finish(run, 0, rewind=True)  # with the checksum of the damaged file
    with pytest.raises(Damaged, match=r"rewind.*cannot be read"):
        run.level(0).check(OPTIONS["epochs"])
    (run.rewind_point.path / "posterior.safetensors").unlink()
    with pytest.raises(Damaged, match=r"rewind.*is missing"):
        run.level(0).check(OPTIONS["epochs"])
    with pytest.raises(FileNotFoundError):
        run.load_rewind_point()


def test_a_damaged_level_is_set_aside_and_keeps_its_learning_rate(tmp_path):
    run = opened(tmp_path)
    finish(run, 1)
    run.level(1).save_divergence({"lr": 0.5})
    run.level(1).set_aside()
    kept = sorted(p.name for p in (tmp_path / "level_01.damaged").iterdir())
    assert kept == ["history.csv", "level.json", "posterior.safetensors", "ticket.safetensors"]
    assert run.level(1).load_divergence() == {"lr": 0.5}
    assert run.results() == []
    assert run.levels() == [1]
    finish(run, 1)
    run.level(1).set_aside()
    assert run.results() == [], "the first that was set aside is kept, and the second is not finished"


def test_a_disk_that_fails_for_a_moment_does_not_make_a_level_damaged(tmp_path, monkeypatch):
    run = opened(tmp_path)
    finish(run, 0)
    failing = OSError(5, "Input/output error")
    cases = ((files, "checksum", MemoryError()), (files, "crc32_of", failing), (untrusted, "read_text", failing))
    for where, name, error in cases:
        with monkeypatch.context() as context:
            context.setattr(where, name, lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises((OSError, MemoryError)):
                run.level(0).check(OPTIONS["epochs"])
    assert run.level(0).check(OPTIONS["epochs"])


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".config.json.1234.tmp").write_text("{")  # killed during the very first write
    run = opened(tmp_path)
    run.level(0).path.mkdir()
    (tmp_path / "level_00" / ".level.json.99.tmp").write_bytes(b"half")
    run.drop_leftovers()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "level_00"]
