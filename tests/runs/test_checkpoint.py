"""A checkpoint within a level: its names, and what is read of one that an earlier version wrote."""

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


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after the first step of its second epoch: its options, and the path of its checkpoint."""
    asked = []
    monkeypatch.setattr(LevelHooks, "stopping", lambda self: asked.append(0) or len(asked) == 2)
    options = Config(**OPTIONS, run_dir=str(tmp_path / "stopped"))
    with pytest.raises(Stopped):
        imp.run_imp(options)
    monkeypatch.undo()
    return options, RunFolder(options.run_dir).level(0).checkpoint


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
