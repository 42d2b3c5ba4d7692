import re
import runpy
import sys

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import sites
from tests.runs.test_first_version import KEPT
from tests.support import small_run


def test_sites_are_the_networks_with_what_was_asked_for(tiny_model):
    guide = pl.guides.mean_field(tiny_model, init_scale=0.01)
    rows = {row["site"]: row for row in sites.describe(tiny_model, guide)}
    assert list(rows) == ["conv.weight", "conv.bias", "hidden.weight", "hidden.bias", "out.weight", "out.bias"]
    assert [name for name, row in rows.items() if row["prunable"]] == ["conv.weight", "hidden.weight"]
    conv = rows["conv.weight"]
    assert (conv["shape"], conv["weights"], conv["guide"]) == ((4, 1, 3, 3), 36, "MeanField")
    assert conv["prior"] == "Normal(loc 0, scale 1)"
    torch.testing.assert_close(conv["scale"], 0.01 * (2 / 9) ** 0.5)


def test_the_command_counts_by_hand(capsys):
    assert sites.main(["--arch", "lenet", "--dataset", "digits", "--prior", "fan_in"]) == 0
    out = capsys.readouterr().out
    assert "conv1.weight" in out
    assert "10 sites, " in out
    assert "4 prunable sites, " in out
    assert sites.main(["--arch", "resnet20", "--guide", "deterministic"]) == 0  # CIFAR-10's shape, without its images
    out = capsys.readouterr().out
    assert "21 prunable sites, 270,256 prunable weights" in out
    assert re.search(r"training with 128 examples a batch takes about 0\.\d\d GiB of memory", out)
    assert sites.main(["--arch", "vit_tiny", "--image-size", "64", "--patch-size", "4"]) == 0
    (embedding,) = [line for line in capsys.readouterr().out.splitlines() if "pos_embed" in line]
    assert "257" in embedding, "16×16 patches and the class token"


def test_bad_input_is_one_line(capsys):
    assert sites.main(["--arch", "lenett"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_commands_are_listed(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "pyro_lottery.__main__", raising=False)  # or runpy warns that it runs it again
    monkeypatch.setattr(sys, "argv", ["pyro_lottery"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("pyro_lottery", run_name="__main__")
    out = capsys.readouterr().out
    for name in ("imp", "controls", "transplant", "evaluate", "report", "sites"):
        assert f"python -m pyro_lottery.{name} " in out


def test_a_run_says_which_pruned_layers_were_sparse(tmp_path, capsys):
    path = str(tmp_path / "run")
    small_run(path, levels=1, sparse="on")
    assert sites.main(["--run-dir", path]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "conv1.weight" in out
    assert "scale after level 0" in out
    assert "level 0, density 100.00%: 0 sparse, 0 dense" in out
    chosen = pl.runs.folder.RunFolder(path).level(1).manifest().layers
    assert len(chosen) > 3
    assert f"level 1, density 80.00%: {len(chosen)} sparse, 0 dense" in out
    for more, told in (
        (["--run-dir", path, "--arch", "lenet"], "leave out --arch"),
        (["--run-dir", path, "--preset", "quick"], "leave out --preset"),
        (["--trust-code"], "--trust-code is for a run; give --run-dir"),
    ):
        assert sites.main(more) == 2
        assert told in capsys.readouterr().err
    assert sites.main(["--run-dir", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_run_of_version_0_1_0_does_not_say_which_layers_were_sparse(capsys):
    assert sites.main(["--run-dir", str(KEPT), "--trust-code"]) == 0
    out = capsys.readouterr().out
    assert "scale after level 0" in out
    assert "sparse" not in out
