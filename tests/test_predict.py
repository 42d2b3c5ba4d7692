import csv
import importlib
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_lottery as pl
from tests.support import ROOT, small_run

predict = importlib.import_module("pyro_lottery.predict")  # pyro_lottery.predict is the function of that name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "run", levels=1, test_size=40)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return run.level(1).export(tmp_path_factory.mktemp("export") / "x").folder


@pytest.fixture(scope="module")
def paths(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = run.load_data().test.inputs
    for i in range(3):
        Image.fromarray(pixels[i, 0].numpy()).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


def rows_of(arguments, capsys):
    assert predict.main([*arguments, "--csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_an_export_and_its_run_say_the_same(run, exported, paths, capsys):
    network = run.level(1).load_model()
    probs = network.predict(run.load_data().test, run.config.eval_samples, run.config.seed)[:3]
    for folder in (exported, run.folder.path):
        rows = rows_of([str(folder), *paths], capsys)
        assert [row["image"] for row in rows] == paths
        assert [row["class"] for row in rows] == [str(int(p.argmax())) for p in probs]
        np.testing.assert_allclose([float(row["probability"]) for row in rows], probs.max(1).values, atol=1e-5)
        total = [float(row["aleatoric"]) + float(row["epistemic"]) for row in rows]
        np.testing.assert_allclose([float(row["total"]) for row in rows], total, atol=1e-6)


def test_the_table_is_of_one_line_per_image(exported, paths, capsys):
    assert predict.main([str(exported), *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(paths)
    assert lines[0].split() == ["image", "class", "probability", "total", "aleatoric", "epistemic"]


@pytest.mark.slow
def test_onnx_is_predicted_without_torch(exported, paths):
    code = (
        "import sys; from pyro_lottery.predict import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'pyro', 'pandas'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported), *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_the_module_does_not_hide_the_function():
    model = pl.BayesianClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), num_data=5)
    guide = pl.guides.mean_field(model)
    x = torch.randn(2, 1, 2, 2)
    torch.manual_seed(0)
    expected = pl.prediction.predict(model, guide, x, 2)
    torch.manual_seed(0)
    assert torch.equal(pl.predict(model, guide, x, 2), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Image.new("L", (9, 8)).save(p), "is 9×8; the network was trained on 8×8 images"),
        (lambda p: Image.new("RGB", (8, 8), (1, 2, 3)).save(p), "is in colour; the network was trained on grey images"),
        (lambda p: p.write_text("no image"), "cannot identify image file"),
        (lambda p: None, "No such file"),
    ],
)
@pytest.mark.parametrize("of", ["export", "run"])
def test_an_image_that_does_not_fit_is_one_line(run, exported, tmp_path, capsys, make, message, of):
    make(tmp_path / "image.png")
    folder = exported if of == "export" else run.folder.path
    assert predict.main([str(folder), str(tmp_path / "image.png")]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m pyro_lottery.predict: ")
    assert message in line


def test_options_of_a_run_do_not_fit_an_export(run, exported, paths, capsys, tmp_path):
    assert predict.main([str(exported), paths[0], "--level", "1"]) == 2
    assert "omit --level" in capsys.readouterr().err
    assert predict.main([str(tmp_path), paths[0]]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert predict.main([str(run.folder.path), paths[0], "--backend", "gpu"]) == 2
    assert "unknown --backend 'gpu'" in capsys.readouterr().err
