import json

import pytest

from pyro_lottery import export
from tests.support import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "run", levels=1, test_size=40)


def test_the_command_exports_the_last_level_and_says_how_near_it_is(run, tmp_path, capsys):
    assert export.main([str(run.folder.path), "-o", str(tmp_path / "x"), "--samples", "2"]) == 0
    out = capsys.readouterr().out
    facts = json.loads((tmp_path / "x" / "export.json").read_text())
    assert (facts["level"], facts["samples"]) == (1, 2)
    assert f"{tmp_path / 'x' / 'model.onnx'}: {facts['bytes']:,} bytes; over 40 test images" in out
    assert "probs " in out
    assert "epistemic " in out


def test_a_loss_of_accuracy_is_printed(run, tmp_path, capsys):
    options = ["--format", "safetensors", "--dtype", "int8", "--level", "0"]
    assert export.main([str(run.folder.path), "-o", str(tmp_path / "x"), *options]) == 0
    facts = json.loads((tmp_path / "x" / "export.json").read_text())
    said = f"accuracy {facts['measured_in_fp32']['accuracy']:.4f} of the run in fp32, {facts['measured']['accuracy']:.4f} in the file"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--level", "7"], 2, "has no finished level 7; finished: [0, 1]"),
        (["--form", "mode"], 2, "unknown --form 'mode'"),
        (["--tolerance", "0"], 1, "more than --tolerance 0; nothing was written"),
    ],
)
def test_errors_are_one_line(run, tmp_path, capsys, options, code, message):
    assert export.main([str(run.folder.path), "-o", str(tmp_path / "x"), *options]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m pyro_lottery.export: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_run_is_one_line(tmp_path, capsys):
    assert export.main([str(tmp_path), "-o", str(tmp_path / "x")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
