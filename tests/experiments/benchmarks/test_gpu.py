"""The programme of the first day on a GPU, dry."""

import json

import pytest
import torch

from experiments.benchmarks.gpu import __main__ as gpu


@pytest.mark.slow
def test_a_dry_day_passes_all_checks_and_goes_on_with_what_is_missing(tmp_path, capsys):
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said
    assert "0 checks failed" in said
    assert {path.stem for path in tmp_path.glob("*.json")} == set(gpu.SECTIONS)
    report = (tmp_path / "report.md").read_text()
    assert "graph = ordinary steps, resnet20, local, 32: the same bits" in report
    (tmp_path / "machine.json").unlink()
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    assert "a launch" in capsys.readouterr().out


def test_networks_are_chosen(tmp_path, capsys):
    assert gpu.main(["waits", "--dry", "--arch", "vgg11", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no wait, vgg11, local at 1" in said
    assert "resnet20" not in said


def test_a_check_that_fails_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    def broken(day):
        yield gpu.held("one", False, 3, 4)
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": broken})
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "FAIL one: 3 (expected 4)" in said
    assert "FAIL broken: ZeroDivisionError: by hand" in said
    assert len(json.loads((tmp_path / "broken.json").read_text())["checks"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_for_unknown_sections_one_line_says_so(tmp_path, capsys):
    for arguments, line in (
        ([], "this machine has no GPU"),
        (["--dry", "sped"], "unknown section 'sped'; known: machine"),
        (["--dry", "--arch", "resnet18"], "--dry has no narrow resnet18; it has resnet20"),
    ):
        with pytest.raises(SystemExit):
            gpu.main([*arguments, "--out", str(tmp_path)])
        assert line in capsys.readouterr().err
