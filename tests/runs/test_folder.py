import json
import math
import os
import platform
import subprocess
import sys
import threading
from dataclasses import replace

import filelock
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import files, seeds, weights
from pyro_lottery.errors import Damaged
from pyro_lottery.runs.folder import LevelFolder, RunFolder
from pyro_lottery.types import LevelResult, Posterior, infinite_info
from tests.support import ticket

OPTIONS = {"arch": "lenet", "levels": 2, "milestones": (3, 4), "seed": 0, "run_dir": "x", "epochs": 5}


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
    return LevelResult(level, 0.6, 6, 10, 0.5, 0.6, None, 1.25, 0.1, 0.2, 0.3, 12.5, 3.25)


def finish(run, level, epochs=OPTIONS["epochs"]):
    """A finished level: its files and its row, which agree."""
    folder, saved = run.level(level), ticket()
    folder.save_ticket(saved)
    folder.save_posterior(pl.masks.apply(saved.mask, saved.start), saved.net)
    folder.save_history([{"epoch": 1.0, "loss": 2.0}] * epochs)
    run.add_result(row(level))


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


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_free(tmp_path):
    code = "import os, sys; from pyro_lottery.runs.folder import RunFolder\nwith RunFolder(sys.argv[1]).lock(): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert (tmp_path / ".owner").exists()
    with RunFolder(tmp_path).lock():
        assert f"pid {os.getpid()}" in (tmp_path / ".owner").read_text()


def test_one_process_at_a_time(tmp_path):
    refused = pytest.raises(
        pl.UserError, match=rf"another process \(pid {os.getpid()} on {platform.node()}\) is at work"
    )
    with RunFolder(tmp_path).lock(), refused, RunFolder(tmp_path).lock():
        pass
    assert not (tmp_path / ".owner").exists()
    with RunFolder(tmp_path).lock():
        pass


def test_the_owner_is_told_though_it_has_only_just_the_lock(tmp_path):
    """Between taking the lock and writing its name an owner may take a while on a busy machine."""
    with filelock.FileLock(tmp_path / ".lock"):
        late = threading.Timer(0.2, (tmp_path / ".owner").write_text, ["pid 7 on elsewhere\n"])
        late.start()
        with pytest.raises(pl.UserError, match=r"another process \(pid 7 on elsewhere\)"), RunFolder(tmp_path).lock():
            pass
        late.join()


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".config.json.1234.tmp").write_text("{")  # killed during the very first write
    run = opened(tmp_path)
    run.level(0).save_checkpoint({"x": torch.ones(1)}, {})
    (tmp_path / "level_00" / ".checkpoint.safetensors.99.tmp").write_bytes(b"half")
    finish(run, 0)  # killed before the finished level's checkpoints went
    opened(tmp_path)
    names = sorted(p.name for p in tmp_path.rglob("*"))
    level = ["history.csv", "level_00", "posterior.safetensors", "results.csv", "ticket.safetensors"]
    assert names == ["config.json", *level]


DAMAGES = {
    "half a posterior": lambda level: truncate(level.path / "posterior.safetensors"),
    "no ticket": lambda level: (level.path / "ticket.safetensors").unlink(),
    "another mask": lambda level: level.save_ticket(ticket(kept=5)),
    "an epoch less": lambda level: level.save_history([{"epoch": 1.0, "loss": 2.0}] * 4),
    "a changed loss": lambda level: replace_text(level.path / "history.csv", "2.0", "1.0"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def replace_text(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_level_whose_files_do_not_agree_with_its_row_is_not_finished(damage, tmp_path):
    run = opened(tmp_path)
    for level in range(3):
        finish(run, level)
    opened(tmp_path)
    assert run.results() == [row(level) for level in range(3)]
    DAMAGES[damage](run.level(1))
    with pytest.warns(UserWarning, match=r"level_01.*; level 1 is trained again"):
        opened(tmp_path)
    assert run.results() == [row(0), row(2)]


def test_other_versions_are_warned_of(tmp_path):
    opened(tmp_path, facts={"versions": {"torch": "1", "python": "3.9"}, "hardware": {"threads": 2}})
    opened(tmp_path, facts={"versions": {"torch": "1", "python": "3.9"}, "hardware": {"threads": 2}})
    with pytest.warns(UserWarning, match="begun with hardware threads = 2, here it is 3"):
        opened(tmp_path, facts={"versions": {"torch": "1"}, "hardware": {"threads": 3}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{}", "lacks the option"),
        ("config.json", "[]", "is not a JSON object"),
        ("config.json", "{", "is not JSON"),
        ("results.csv", "level,density\n0,x\n", "is not one of our tables"),
        ("results.csv", "density\n1.0\n", "is not a table of levels"),
        ("results.csv", "level,density\n0,1\n", "is not a table of levels"),
        ("results.csv", "level,thesis\n0,1\n", "has a column 'thesis'"),
    ],
)
def test_damaged_text_is_named(tmp_path, name, content, message):
    opened(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(pl.UserError, match=message):
        opened(tmp_path)


def test_a_changed_digit_is_noticed(tmp_path):
    run = opened(tmp_path)
    for level in range(3):
        finish(run, level)
    before = (tmp_path / "config.json").read_text()
    replace_text(tmp_path / "config.json", '"epochs": 5', '"epochs": 6')
    with pytest.raises(pl.UserError, match=r"config\.json.*fails its checksum"):
        opened(tmp_path)
    (tmp_path / "config.json").write_text(before)
    table = tmp_path / "results.csv"
    whole = table.read_text()
    for damaged in (
        whole.replace("0.5", "0.9", 1),
        whole.replace("density", "remaining", 1),
        whole[: whole.rstrip().rfind("\n") + 1],  # the last row is missing
    ):
        table.write_text(damaged)
        with pytest.raises(pl.UserError, match="fails its checksum; the run's command repairs it"):
            run.results()
    table.write_text(whole[: whole.find("\n") + 1])
    with pytest.raises(pl.UserError, match="has no rows"):
        run.results()


def test_the_runs_command_keeps_the_whole_rows_of_a_damaged_table(tmp_path):
    run, table = opened(tmp_path), tmp_path / "results.csv"
    for level in range(3):
        finish(run, level)
    whole = table.read_text()
    table.write_text(whole.replace("0.6,6,10,0.5", "0.6,6,10,0.9", 1))
    with pytest.warns(UserWarning, match=r"the row '0,0\.6,6,10,0\.9.* is damaged; its level is trained again"):
        opened(tmp_path)
    assert run.results() == [row(1), row(2)]
    table.write_text(whole.replace("density", "remaining", 1))
    with pytest.warns(UserWarning, match="damaged header, which is mended"):
        opened(tmp_path)
    assert run.results() == [row(level) for level in range(3)]
    table.write_text(whole[: whole.rstrip().rfind("\n") + 1])
    opened(tmp_path)
    assert run.results() == [row(0), row(1)]


def test_what_is_taken_for_damage_is_set_aside_and_other_levels_are_not_looked_at(tmp_path):
    run = opened(tmp_path)
    for level in range(3):
        finish(run, level)
    run.level(1).save_divergence({"lr": 0.5})
    truncate(tmp_path / "level_01" / "posterior.safetensors")
    run.open(OPTIONS, {}, [0, 2])
    assert len(run.results()) == 3
    with pytest.warns(UserWarning, match="level 1 is trained again"):
        opened(tmp_path)
    kept = sorted(p.name for p in (tmp_path / "level_01.damaged").iterdir())
    assert kept == ["history.csv", "posterior.safetensors", "ticket.safetensors"]
    assert run.level(1).load_divergence() == {"lr": 0.5}


def test_a_disk_that_fails_for_a_moment_does_not_make_a_level_unfinished(tmp_path, monkeypatch):
    run = opened(tmp_path)
    finish(run, 0)
    for name, error in (("read_text", OSError(5, "Input/output error")), ("checksum", MemoryError())):
        with monkeypatch.context() as context:
            context.setattr(files, name, lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises((OSError, MemoryError, pl.UserError)):
                opened(tmp_path)
    assert run.results() == [row(0)]


def test_a_late_rewind_point_is_part_of_level_0(tmp_path):
    options, facts = OPTIONS | {"rewind": "epoch:1"}, {"streams": seeds.STREAMS}
    run = opened(tmp_path, options, facts)
    for level in range(2):
        finish(run, level, OPTIONS["epochs"] - level)
    with pytest.warns(UserWarning, match=r"rewind.*level 0 is trained again"):
        opened(tmp_path, options, facts)
    assert run.results() == [row(1)]
    with pytest.raises(FileNotFoundError):
        run.load_rewind_point()


def test_levels_after_a_late_rewind_have_the_epochs_from_there(tmp_path):
    options, facts = OPTIONS | {"rewind": "epoch:2"}, {"streams": seeds.STREAMS}
    run = opened(tmp_path, options, facts)
    run.rewind_point.save_posterior(ticket().start, {})
    for level, epochs in enumerate((5, 3, 5)):
        finish(run, level, epochs)
    with pytest.warns(UserWarning, match=r"has 5 of 3 epochs; level 2 is trained again"):
        opened(tmp_path, options, facts)
    assert run.results() == [row(0), row(1)]


def test_files_of_others_are_not_touched(tmp_path):
    folder, victim = tmp_path / "home", tmp_path / "victim"
    (folder / "docs").mkdir(parents=True)
    for path in (folder / ".important.tmp", folder / "docs" / ".thesis.123.tmp", victim):
        path.write_text("mine")
    with pytest.raises(pl.UserError, match="not empty and holds no run"):
        opened(folder)
    run = opened(tmp_path / "run")
    control = run.derived("controls", "reinit").path
    control.mkdir(parents=True)
    (control / ".results.csv.77.tmp").write_text("being written by the control's process")
    (run.path / ".owner").symlink_to(victim)
    with run.lock():
        opened(tmp_path / "run")
    kept = [folder / ".important.tmp", folder / "docs" / ".thesis.123.tmp", control / ".results.csv.77.tmp", victim]
    assert [p.read_text()[:4] for p in kept] == ["mine", "mine", "bein", "mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": "2"}, "levels is '2', not a whole number"),
        ({"versions": []}, r"versions is \[\]; expected an object"),
        ({"control": 5}, "control is 5; expected text"),
    ],
)
def test_a_config_of_other_types_is_named(change, message, tmp_path):
    opened(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OPTIONS | change))
    with pytest.raises(pl.UserError, match=message):
        opened(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    run = opened(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(pl.UserError, match="not a regular file"):
        run.config  # noqa: B018
    os.mkfifo(tmp_path / "t.safetensors")
    with pytest.raises(OSError, match="not a regular file"):
        files.load_tensors(tmp_path / "t.safetensors")
    with pytest.raises(pl.UserError, match="not a regular file"):
        weights.load(tmp_path / "t.safetensors")


def test_folders_of_the_first_version_without_checksums_are_read(tmp_path):
    run = opened(tmp_path)
    finish(run, 0)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    (tmp_path / "results.csv").write_text("".join(f"{line.rpartition(',')[0]}\n" for line in lines))
    config = run.config
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run.results() == [row(0)]
    assert run.config == config


def test_a_checkpoint_that_cannot_be_verified_replaces_none(tmp_path, monkeypatch):
    folder = LevelFolder(tmp_path)
    for epoch in (1, 2):
        folder.save_checkpoint({"x": torch.ones(3)}, {"epoch": epoch})
    write = files.write_atomic
    monkeypatch.setattr(files, "write_atomic", lambda path, data: write(path, data[:-1]))
    with pytest.raises(Damaged, match=r"checkpoint\.new"):
        folder.save_checkpoint({"x": torch.ones(3)}, {"epoch": 3})
    assert [files.load_tensors(p)[1]["epoch"] for p in (folder.checkpoint, folder.checkpoint_before)] == [2, 1]


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


def test_a_table_with_a_flipped_bit_or_without_rows_is_mended(tmp_path):
    run, table = opened(tmp_path), tmp_path / "results.csv"
    for level in range(2):
        finish(run, level)
    whole = bytearray(table.read_bytes())
    whole[whole.index(b"\n") + 3] ^= 0x80  # no longer UTF-8
    table.write_bytes(whole)
    with pytest.warns(UserWarning, match="is damaged; its level is trained again"):
        opened(tmp_path)
    assert run.results() == [row(1)]
    table.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"results.csv has no rows; levels are trained again"):
        opened(tmp_path)
    assert run.results() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nll": math.nan}, "has nan as nll of level 0"),
        ({"density": math.inf}, "has inf as density of level 0"),
        ({"density": -1.0}, "level 0 keeps 6 of 10 weights"),
        ({"remaining": 11}, "level 0 keeps 11 of 10 weights"),
        ({"total": 0, "remaining": 0}, "level 0 keeps 0 of 0 weights"),
    ],
)
def test_a_row_of_impossible_numbers_is_refused(change, message, tmp_path):
    run = opened(tmp_path)
    run.add_result(replace(row(0), **change))
    with pytest.raises(pl.UserError, match=message):
        run.results()


def test_other_kernels_are_warned_of(tmp_path):
    opened(tmp_path, facts={"kernels": "compiled"})
    with pytest.warns(UserWarning, match="begun with kernels = compiled, here it is torch_path"):
        opened(tmp_path, facts={"kernels": "torch_path"})


def test_a_run_of_other_random_streams_is_warned_of_and_refused_where_they_chose_its_images(tmp_path):
    opened(tmp_path / "whole")
    with pytest.warns(UserWarning, match="begun by an earlier version: what is trained now draws other random numbers"):
        opened(tmp_path / "whole", facts={"streams": seeds.STREAMS})
    part = OPTIONS | {"val_fraction": 0.1}
    opened(tmp_path / "part", part)
    with pytest.raises(pl.UserError, match="earlier version, which drew the images of --val-fraction"):
        opened(tmp_path / "part", part, {"streams": seeds.STREAMS})
    opened(tmp_path / "new", part, {"streams": seeds.STREAMS})
    opened(tmp_path / "new", part, {"streams": seeds.STREAMS}).check_subsets()


def test_a_full_disk_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "config.json")

    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        opened(tmp_path / "run")


def test_a_link_within_a_run_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = opened(tmp_path / "run")
    (tmp_path / "run" / "evaluation").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(pl.UserError, match="evaluation is a link"):
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


def test_a_run_made_in_python_is_known_by_its_checksum_exactly_and_by_sums_to_rounding(tmp_path):
    own = {"initial_values": 4_000_000_000, "log_joint": -123.4}
    run = RunFolder(tmp_path / "run")
    run.open(OPTIONS, {"own": own})
    run.open(OPTIONS, {"own": own | {"log_joint": -123.4001}})
    for other in ({"initial_values": 4_000_000_001}, {"log_joint": -123.5}):
        with pytest.raises(pl.UserError, match=f"{next(iter(other))} is "):
            run.open(OPTIONS, {"own": own | other})
