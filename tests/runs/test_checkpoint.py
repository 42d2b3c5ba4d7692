"""A checkpoint within a level: its names, and what is read of one that an earlier version wrote."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from pyro_lottery import files, imp, untrusted
from pyro_lottery.errors import Damaged, Stopped
from pyro_lottery.runs.checkpoint import LevelHooks
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder

OPTIONS = {
    "dataset": "digits", "arch": "lenet", "levels": 0, "epochs": 2, "milestones": (), "train_size": 128, "batch_size": 64,
    "train_samples": 1, "eval_samples": 1, "test_size": 50,
}  # fmt: skip


def stop(monkeypatch, options):
    """Start a run, and stop it after the first step of its second epoch; returns the path of its checkpoint."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(LevelHooks, "stopping", lambda self: asked.append(0) or len(asked) == 2)
        with pytest.raises(Stopped):
            imp.run_imp(options)
    return RunFolder(options.run_dir).level(0).checkpoint


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped within its second epoch: its options, and the path of its checkpoint."""
    options = Config(**OPTIONS, run_dir=str(tmp_path / "stopped"))
    return options, stop(monkeypatch, options)


def test_a_checkpoint_is_as_promised_and_one_of_an_earlier_version_goes_on(stopped, tmp_path):
    options, checkpoint = stopped
    tensors, info = untrusted.load_tensors(checkpoint)
    # and net/, of which lenet has nothing
    assert {name.split("/")[0] for name in tensors} == {"guide", "optimizer", "generator", "sums"}
    assert {name for name in tensors if name.startswith(("optimizer/0", "generator"))} == {
        "optimizer/0/step", "optimizer/0/exp_avg", "optimizer/0/exp_avg_sq", "generator/order", "generator/noise",
    }  # fmt: skip
    assert (info["epoch"], info["step"], info["device"], len(info["history"])) == (1, 1, "cpu", 1)
    assert info["seconds"] > 0
    files.save_tensors(checkpoint, tensors, {name: value for name, value in info.items() if name != "belongs"})
    resumed = imp.run_imp(options)
    whole = imp.run_imp(Config(**OPTIONS, run_dir=str(tmp_path / "whole")))
    for kind in ("loc", "scale"):
        found, expected = (getattr(run.level(0).posterior, kind) for run in (resumed, whole))
        assert all(torch.equal(value, found[site]) for site, value in expected.items())
    assert resumed.level(0).history["loss"].tolist() == whole.level(0).history["loss"].tolist()


def test_a_checkpoint_of_other_parameters_is_refused(stopped):
    options, checkpoint = stopped
    tensors, info = untrusted.load_tensors(checkpoint)
    files.save_tensors(checkpoint, tensors, info | {"belongs": info["belongs"] + 1})
    with pytest.raises(Damaged, match=r"belongs to another training .*Adam's moments of another network"):
        imp.run_imp(options)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: shutil.copy(path.parents[1] / "level_00/ticket.safetensors", path)]
)
def test_a_rewind_point_that_changed_while_level_0_trained_is_made_again(damage, tmp_path, monkeypatch):
    options = OPTIONS | {"rewind": "epoch:1"}
    config = Config(**options, run_dir=str(tmp_path / "stopped"))
    stop(monkeypatch, config)
    rewind = tmp_path / "stopped" / "rewind" / "posterior.safetensors"
    written = rewind.read_bytes()
    damage(rewind)
    with pytest.warns(UserWarning, match=r"rewind is not the rewind point that this training wrote; .* from its start"):
        imp.run_imp(config)
    assert rewind.read_bytes() == written
    assert RunFolder(config.run_dir).level(0).check(OPTIONS["epochs"])


def test_progress_within_an_epoch_tells_the_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pyro_lottery.training.loop.CHECK_EVERY", 1)
    monkeypatch.setattr("pyro_lottery.runs.progress.PLAIN_SECONDS", 0.0)
    imp.run_imp(Config(**OPTIONS | {"epochs": 1}, run_dir=str(tmp_path / "run")))
    within = next(line for line in capsys.readouterr().out.splitlines() if "epoch 0.5/1" in line)
    assert re.search(r"nll [\d.]+, train accuracy [\d.]+ %, [\d,]+ examples/s", within)
