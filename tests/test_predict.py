import csv
import importlib
import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_lottery as pl
from pyro_lottery.data import images
from pyro_lottery.exports import predictor
from pyro_lottery.exports.predictor import Predictor
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
        (lambda p: None, "is not a file"),
    ],
)
@pytest.mark.parametrize("of", ["export", "run"])
def test_an_image_that_does_not_fit_is_one_line(run, exported, tmp_path, capsys, make, message, of):
    make(tmp_path / "image.png")
    folder = exported if of == "export" else run.folder.path
    assert predict.main([str(folder), str(tmp_path / "image.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m pyro_lottery.predict: ")
    assert message in line


def error_of(arguments, capsys):
    capsys.readouterr()
    assert predict.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    return line, said.out


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"no network",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"probs"', b'"prob\x1b"'),
    ],
)
def test_damaged_graphs_are_one_line(exported, paths, tmp_path, capsys, damage):
    folder = shutil.copytree(exported, tmp_path / "x")
    (folder / "model.onnx").write_bytes(damage((exported / "model.onnx").read_bytes()))
    line, _ = error_of([folder, *paths], capsys)
    assert "model.onnx is not an export of pyro_lottery" in line


def test_graphs_of_others_are_one_line(paths, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    line, _ = error_of([tmp_path, *paths], capsys)
    assert "model.onnx is not an export of pyro_lottery (KeyError: 'pyro_lottery')" in line


def test_folders_are_named_and_hold_a_network(run, exported, paths, tmp_path, capsys):
    line, _ = error_of([exported / "model.onnx", *paths], capsys)
    assert f"is a file; give its folder, {exported}" in line
    run.level(1).export(tmp_path / "x", format="state_dict")
    line, _ = error_of([tmp_path / "x", *paths], capsys)
    assert "holds weights alone" in line


def test_what_was_predicted_before_a_bad_image_is_printed(exported, paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    (tmp_path / "no.png").write_text("no image")
    line, out = error_of([exported, *paths[:2], tmp_path / "no.png"], capsys)
    assert "no.png is not an image that can be read" in line
    assert len(out.splitlines()) == 3
    line, out = error_of([exported, *paths, tmp_path / "a.png", tmp_path / "b.png"], capsys)
    assert "a.png is not a file, and 1 more" in line
    assert out == ""


def test_images_are_read_as_a_run_reads_them(exported, tmp_path):
    assert predictor.FORMATS == images.FORMATS
    assert predictor.PIXELS == (images.PIXELS, images.RESIZED_PIXELS)
    Image.new("1", (8192, 4096)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="it has 8192×4096 pixels, more than 16,777,216"):
        Predictor(exported).read([tmp_path / "large.png"])
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(ValueError, match="cannot identify image file"):
        Predictor(exported).read([tmp_path / "eps.png"])


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(exported, paths):
    command = f"{sys.executable} -m pyro_lottery.predict {exported} {' '.join(paths * 400)} | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "image"


def test_options_of_a_run_do_not_fit_an_export(run, exported, paths, capsys, tmp_path):
    assert predict.main([str(exported), paths[0], "--level", "1"]) == 2
    assert "omit --level" in capsys.readouterr().err
    assert predict.main([str(exported), paths[0], "--level", "0"]) == 2
    assert "omit --level" in capsys.readouterr().err
    assert predict.main([str(tmp_path), paths[0]]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert predict.main([str(run.folder.path), paths[0], "--backend", "gpu"]) == 2
    assert "unknown --backend 'gpu'" in capsys.readouterr().err
