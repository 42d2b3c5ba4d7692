import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

import pyro_lottery as pl
from pyro_lottery import controls, files, transplant
from pyro_lottery.errors import Damaged, Failed
from pyro_lottery.exports import formats
from pyro_lottery.exports.formats import GraphPredictor
from pyro_lottery.exports.networks import Pixels
from pyro_lottery.exports.predictor import Predictor
from pyro_lottery.kernels import native
from pyro_lottery.runs import export_forms, exporting, packed_ticket
from pyro_lottery.runs.predicting import open_folder
from pyro_lottery.untrusted import load_tensors
from tests.support import ROOT, TinyNet, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "run", eval_samples=3, test_size=60)


@pytest.fixture(scope="module")
def images(run):
    return run.load_data().test.inputs.numpy()


def own_probabilities(run, form, images, level=2):
    network = run.level(level).load_model()
    x = run.load_data().test.normalize(torch.from_numpy(images))
    if form == "mean":
        return network.predict_mean(x).numpy()
    return network.predict(x, run.config.eval_samples, run.config.seed).numpy()


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("form", ["mean", "draws", pytest.param("moments", marks=pytest.mark.slow)])
def test_a_graph_predicts_what_the_run_does(run, images, tmp_path, form, format):
    facts = run.level(2).export(tmp_path / "x", form, format).facts
    found = (Predictor if format == "onnx" else GraphPredictor)(tmp_path / "x")
    assert facts["outputs"] == ["probs", "total", "aleatoric", "epistemic"][: 4 if form == "draws" else 2]
    for count in (1, 32, 60):
        outputs = found(images[:count])
        if form != "moments":
            np.testing.assert_allclose(outputs["probs"], own_probabilities(run, form, images)[:count], atol=1e-5)
        p = outputs["probs"].astype(float)
        np.testing.assert_allclose(outputs["total"], -(p * np.log(p.clip(1e-30))).sum(1), atol=1e-5)
    assert max(facts["largest_difference"].values()) <= 1e-5
    assert json.loads((tmp_path / "x" / "export.json").read_text()) == json.loads(json.dumps(facts))


class TwiceUsed(torch.nn.Module):
    """A convolution that is used twice, with a normalisation after each."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(1) for _ in range(2))
        self.out = torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.norms[1](self.conv(self.norms[0](self.conv(x)))).flatten(1))


def test_the_variances_of_folded_biases_and_of_a_layer_used_twice_are_kept():
    torch.manual_seed(0)
    model = pl.BayesianClassifier(TwiceUsed(), num_data=5)
    guide = pl.guides.mean_field(model)
    scales = {"conv.weight": 1e-6, "conv.bias": 0.5, "out.weight": 1e-6, "out.bias": 1e-6}
    start = pl.posterior(guide)
    scale = {name: torch.full_like(value, scales[name]) for name, value in start.loc.items()}
    pl.guides.set_posterior_(guide, pl.Posterior(start.loc, scale, start.prunable))
    for norm in model.net.norms:
        norm.running_var.fill_(0.25)
    network = export_forms.Moments(
        *export_forms.moments_of(model, guide, {}, torch.zeros(2, 1, 4, 4)), Pixels(torch.zeros(1), torch.ones(1)), 3
    )
    _, found = network.logits(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    # The first bias reaches the logits through the second convolution, the second one directly: both by hand.
    loc = start.loc
    gain = (0.25 + 1e-5) ** -0.5
    ones = torch.ones(1, 1, 4, 4)
    inner = torch.nn.functional.conv2d(ones * (0.5 * gain) ** 2, loc["conv.weight"].square(), padding=1) * gain**2
    spread = inner + (0.5 * gain) ** 2
    expected = spread.flatten(1) @ loc["out.weight"].square().T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_draws_are_the_probabilities_behind_the_results(run, images, tmp_path):
    facts = run.level(1).export(tmp_path / "x").facts
    row = run.row(1)
    assert facts["measured"]["accuracy"] == pytest.approx(row.test_accuracy)
    assert facts["measured"]["nll"] == pytest.approx(row.nll, abs=1e-5)
    other = run.level(1).export(tmp_path / "y", samples=2, seed=5).facts
    assert (other["samples"], other["seed"]) == (2, 5)
    network = run.level(1).load_model()
    expected = network.predict(run.load_data().test, 2, 5)
    np.testing.assert_allclose(Predictor(tmp_path / "y")(images)["probs"], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_a_small_ticket_predicts_what_the_run_does(run, images, tmp_path, dtype):
    facts = run.level(2).export(tmp_path / "x", format="safetensors", dtype=dtype).facts
    found = open_folder(tmp_path / "x")(images)["probs"]
    atol = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 0.03, "int8": 0.1}[dtype]
    np.testing.assert_allclose(found, own_probabilities(run, "draws", images), atol=atol)
    assert facts["bytes"] < facts["dense_bytes"]
    packed = pl.Ticket.load(tmp_path / "x" / "ticket.safetensors")
    assert all(torch.equal(m, run.level(2).ticket.mask[name]) for name, m in packed.mask.items())
    if dtype == "fp32":
        posterior = run.level(2).posterior
        assert all(
            torch.equal(v[packed.mask[n]], posterior.loc[n][packed.mask[n]])
            for n, v in packed.start.loc.items()
            if n in packed.mask
        )


@pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
@pytest.mark.parametrize("samples", [3, 20])
def test_draws_in_one_pass_are_those_one_by_one(run, images, tmp_path, monkeypatch, samples):
    run.level(2).export(tmp_path / "x", format="safetensors", samples=samples)
    asked = []

    def faster(first, second, what):
        asked.append(what)
        return way == "together"

    monkeypatch.setattr(packed_ticket, "is_faster", faster)
    found = {}
    for way in ("together", "apart"):
        network = open_folder(tmp_path / "x")
        found[way] = [network(images[:count]) for count in (1, 5, packed_ticket.MOST_IMAGES + 1)]
    assert len(asked) == 4, "of the two small batches"
    assert network(images[:0])["probs"].shape == (0, 10)
    assert f"{samples} draws" in asked[0]
    for together, apart in zip(*found.values(), strict=True):
        for name in apart:
            np.testing.assert_allclose(together[name], apart[name], atol=1e-5)


def test_a_small_ticket_without_scales_is_a_deterministic_network(run, images, tmp_path):
    run.level(2).export(tmp_path / "x", "mean", "safetensors")
    found = open_folder(tmp_path / "x")
    assert found.facts["outputs"] == ["probs", "total"]
    np.testing.assert_allclose(found(images)["probs"], own_probabilities(run, "mean", images), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("format", ["state_dict", "prune", "csr"])
def test_a_state_dict_is_one_that_torch_loads(run, images, tmp_path, format):
    run.level(2).export(tmp_path / "x", format=format)
    state = torch.load(tmp_path / "x" / "model.pt", weights_only=True)
    mask = run.level(2).ticket.mask
    net = pl.create_model("lenet", 10, 1, 8)
    if format == "prune":
        for name, module in list(net.named_modules()):
            if f"{name}.weight" in mask:
                torch.nn.utils.prune.identity(module, "weight")
        assert all(torch.equal(state[f"{name}_mask"].bool(), m) for name, m in mask.items())
    if format == "csr":
        linear = [name for name, m in mask.items() if m.ndim == 2]
        assert [name for name, value in state.items() if value.layout == torch.sparse_csr] == linear
        assert all(state[name].values().numel() == int(mask[name].sum()) for name in linear)
        state = {name: value.to_dense() for name, value in state.items()}
    net.load_state_dict(state)
    net.eval()(torch.zeros(1, 1, 8, 8))  # the hooks of torch.nn.utils.prune multiply
    x = run.load_data().test.normalize(torch.from_numpy(images))
    probs = net(x).softmax(1).detach().numpy()
    np.testing.assert_allclose(probs, own_probabilities(run, "mean", images), atol=1e-6)
    with pytest.raises(pl.UserError, match="holds one weight for each; omit --form draws"):
        run.level(2).export(tmp_path / "y", "draws", format)


@pytest.mark.parametrize("format", ["csr", "safetensors", "prune"])
def test_what_was_exported_can_be_transplanted(run, tmp_path, format):
    run.level(2).export(tmp_path / "x", "mean", format)
    file = "ticket.safetensors" if format == "safetensors" else "model.pt"
    source, masked = transplant.read(tmp_path / "x" / file)
    found = transplant.ticket_of(source, masked, run.initial(0))
    assert all(torch.equal(m, run.level(2).ticket.mask[name]) for name, m in found.mask.items())
    loc = run.level(2).posterior.loc
    assert all(
        torch.equal(v, loc[n] * found.mask[n] if n in found.mask else loc[n]) for n, v in found.start.loc.items()
    )


def test_a_deterministic_run_has_one_draw(tmp_path):
    run = small_run(tmp_path / "run", guide="deterministic", score="magnitude", levels=1, test_size=40)
    facts = run.level(1).export(tmp_path / "x").facts
    assert facts["outputs"] == ["probs", "total"]
    with pytest.raises(pl.UserError, match="has no variances; use --form mean"):
        run.level(1).export(tmp_path / "y", "moments")
    run.level(1).export(tmp_path / "z", format="safetensors")
    assert open_folder(tmp_path / "z").facts["outputs"] == ["probs", "total"]


def test_files_give_the_run_s_own_probabilities(run, images, tmp_path):
    run.level(2).export(tmp_path / "x")
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(images[i, 0]).save(paths[-1])
    for folder in (tmp_path / "x", run.folder.path):
        network = open_folder(folder)
        found = network(network.read(paths))["probs"]
        np.testing.assert_allclose(found, own_probabilities(run, "draws", images)[:5], atol=1e-5)


def test_no_random_operator_and_no_pyro_name_is_in_the_graph(run, tmp_path):
    import onnx

    run.level(2).export(tmp_path / "x")
    model = onnx.load(tmp_path / "x" / "model.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert not {name for name in operators if "Random" in name or "Bernoulli" in name}
    assert [i.name for i in model.graph.input] == ["images"]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("format", exporting.FORMATS)
def test_no_path_of_this_machine_is_in_a_file(run, tmp_path, format):
    run.level(2).export(tmp_path / "x", format=format)
    here = [str(ROOT).encode(), str(run.folder.path).encode(), str(tmp_path).encode(), b"site-packages"]
    for path in (tmp_path / "x").iterdir():
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert not [place for place in here if place in content], path.name


def test_what_differs_is_not_written(run, tmp_path, monkeypatch):
    name, save, load = formats.GRAPHS["pt2"]

    def wrong(program, path, facts):
        with torch.no_grad():
            next(value for value in program.state_dict.values() if value.ndim == 2).add_(0.01)
        save(program, path, facts)

    monkeypatch.setitem(formats.GRAPHS, "pt2", (name, wrong, load))
    with pytest.raises(Failed, match=r"differs by .* from the run's, more than --tolerance 1e-05; nothing was written"):
        run.level(2).export(tmp_path / "x", "mean", "pt2")
    assert not list(tmp_path.iterdir())


class Mixing(torch.nn.Module):
    """A network whose outputs depend on the other images of a batch."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(64, 16), torch.nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.hidden(x.flatten(1))
        return self.out(torch.relu(x - x.mean(0)))


def test_a_network_that_mixes_a_batch_is_refused_in_every_precision(tmp_path):
    run = small_run(tmp_path / "run", arch=f"{__name__}:Mixing", levels=0, epochs=2, lr=0.05)
    for dtype in ("fp32", "int8"):
        with pytest.raises(Failed, match="nothing was written"):
            run.level(0).export(tmp_path / "x", "draws", "safetensors", dtype=dtype)


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "card", stop)
    with pytest.raises(KeyboardInterrupt):
        run.level(2).export(tmp_path / "x", "mean")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "median"}, "unknown --form 'median'"),
        ({"format": "tflite"}, "unknown --format 'tflite'"),
        ({"dtype": "int8"}, "--dtype int8 is for --format safetensors"),
        ({"format": "safetensors", "dtype": "int3"}, "unknown --dtype 'int3'"),
        ({"format": "safetensors", "form": "moments"}, "holds loc and scale; choose --form draws"),
        ({"tolerance": float("nan")}, "--tolerance must be a finite number, at least 0, got nan"),
        ({"tolerance": -1}, "--tolerance must be a finite number, at least 0, got -1"),
        ({"form": "mean", "samples": 3}, "--samples and --seed are of --form draws"),
        ({"form": "moments", "seed": 3}, "--samples and --seed are of --form draws"),
        ({"samples": 0}, "samples must be a whole number, at least 1, got 0"),
        ({"licence": "MIT\n[x](y)"}, "is no identifier of a licence"),
    ],
)
def test_bad_options_are_one_line(run, tmp_path, options, message):
    with pytest.raises(pl.UserError, match=message):
        run.level(2).export(tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_touched(run, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(pl.UserError, match="exists; choose a new folder"):
        run.level(2).export(tmp_path / "x")
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("folder", ["", "..", "a\0b"])
def test_what_is_no_name_of_a_folder_is_refused(run, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pl.UserError, match="this is no name of a new folder"):
        run.level(2).export(folder)


def test_an_export_does_not_go_into_a_run(run):
    with pytest.raises(pl.UserError, match="is in the run's folder"):
        run.level(2).export(run.folder.path / "exports" / "x")


def test_folders_that_were_made_for_nothing_go(run, tmp_path):
    with pytest.raises(Failed):
        run.level(2).export(tmp_path / "a" / "b" / "x", "mean", "pt2", tolerance=0)
    assert not list(tmp_path.iterdir())


def test_one_test_image_is_enough(tmp_path):
    run = small_run(tmp_path / "run", levels=0, test_size=1)
    images = run.load_data().test.inputs.numpy().repeat(3, 0)
    run.level(0).export(tmp_path / "x", "mean", "pt2")
    np.testing.assert_allclose(
        GraphPredictor(tmp_path / "x")(images)["probs"], own_probabilities(run, "mean", images, 0), atol=1e-5
    )


def test_a_network_made_in_python_has_a_small_ticket(tmp_path):
    x = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    data = pl.data.from_tensors(x, torch.arange(40) % 3, x, torch.arange(40) % 3)
    run = pl.find_tickets(TinyNet(), data, levels=1, epochs=1, milestones=(), run_dir=str(tmp_path / "run"))
    facts = run.level(1).export(tmp_path / "x", format="safetensors").facts
    assert max(facts["largest_difference"].values()) <= 1e-5
    with pytest.raises(pl.UserError, match=r"was made in Python; use it with pl\.Ticket\.load"):
        open_folder(tmp_path / "x")
    assert pl.Ticket.load(tmp_path / "x" / "ticket.safetensors").mask.keys() == run.level(1).ticket.mask.keys()


def test_a_joint_guide_has_a_small_ticket_of_means_alone(tmp_path):
    guide = "pyro.infer.autoguide.AutoLowRankMultivariateNormal"
    run = small_run(tmp_path / "run", guide=guide, levels=0, test_size=20, train_size=40)
    with pytest.raises(pl.UserError, match=r"which do not determine guide .*; choose --form mean"):
        run.level(0).export(tmp_path / "x", format="safetensors")
    assert run.level(0).export(tmp_path / "x", "mean", "safetensors").facts["outputs"] == ["probs", "total"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"image_shape": [1, 30000, 30000]}, "they are of another network than its options"),
        ({"image_shape": [1, 8, 10**12]}, "image_shape is not three sizes"),
        ({"samples": -1}, r"level, samples and seed are \[2, -1, 0\]"),
        ({"samples": 10**9}, "level, samples and seed are"),
        ({"classes": ["a\x1b[2J"] * 10}, "classes are not names"),
        ({"classes": ["a"]}, "they are of another network"),
        ({"mean": [1.0, 2.0]}, "mean and std are not numbers of each channel"),
        ({"std": [0.0]}, "mean and std are not finite, std above 0"),
        ({"outputs": ["probs"]}, "outputs are unknown"),
    ],
)
def test_facts_of_a_ticket_that_cannot_be_are_damage(run, tmp_path, facts, message):
    run.level(2).export(tmp_path / "x", format="safetensors")
    path = tmp_path / "x" / "ticket.safetensors"
    tensors, info = load_tensors(path)
    files.save_tensors(path, tensors, {**info, "facts": {**info["facts"], **facts}})
    with pytest.raises(Damaged, match=message):
        open_folder(tmp_path / "x")


def test_options_of_a_ticket_that_cannot_be_name_the_file(run, tmp_path):
    run.level(2).export(tmp_path / "x", format="safetensors")
    path = tmp_path / "x" / "ticket.safetensors"
    tensors, info = load_tensors(path)
    files.save_tensors(path, tensors, {**info, "config": {**info["config"], "lr": "fast"}})
    with pytest.raises(pl.UserError, match=r"ticket\.safetensors: the options of its run are not valid \(.*lr"):
        open_folder(tmp_path / "x")


@pytest.mark.parametrize("damage", [lambda data: b"no archive", lambda data: data[: len(data) // 2]])
def test_damaged_programs_are_one_line(run, tmp_path, damage):
    run.level(2).export(tmp_path / "x", "mean", "pt2")
    path = tmp_path / "x" / "model.pt2"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.pt2 is not an export of pyro_lottery") as found:
        open_folder(tmp_path / "x", trust_code=True)
    assert "\n" not in str(found.value)


def test_detections_are_on_cards_of_draws_alone_and_damage_to_them_is_found_first(run, tmp_path):
    path = run.folder.path / "evaluation" / "ood.csv"
    path.parent.mkdir()
    try:
        path.write_text("level,ood,score,auroc\n2,noise|[a](b),entropy,0.75\n1,noise,entropy,0.25\n")
        run.level(2).export(tmp_path / "draws", format="safetensors")
        run.level(2).export(tmp_path / "mean", "mean", "safetensors")
        cards = {form: (tmp_path / form / "README.md").read_text() for form in ("draws", "mean")}
        assert r"AUROC of noise\|\[a\](b) by entropy | 0.7500" in cards["draws"]
        assert "0.2500" not in cards["draws"].split("## Use")[0].split("AUROC")[1]
        assert "AUROC" not in cards["mean"]
        path.write_text("level,ood,score,auroc\n2,noise,entropy,high\n")
        with pytest.raises(Damaged, match=r"ood\.csv is damaged .*; run python -m pyro_lottery\.evaluate again"):
            run.level(2).export(tmp_path / "x")
    finally:
        path.unlink()
        path.parent.rmdir()


def test_the_card_says_what_its_file_is(run, tmp_path):
    for format in ("state_dict", "pt2"):
        run.level(2).export(tmp_path / format, "mean", format)
    weights, program = ((tmp_path / format / "README.md").read_text() for format in ("state_dict", "pt2"))
    assert "The file holds weights alone" in weights
    assert "pyro_lottery.predict" not in weights
    assert "pyro_lottery.predict . --trust-code image.png" in program


def test_the_card_says_how_its_network_was_made(tmp_path):
    def card(run, name):
        run.level(1).export(tmp_path / name, "mean", "state_dict")
        return (tmp_path / name / "README.md").read_text()

    run = small_run(tmp_path / "run", guide="deterministic", levels=1, epochs=2, rewind="epoch:1", score="random")
    text = card(run, "a")
    assert "found by iterative pruning with the score `random`: " in text
    assert "1 epoch of this level" in text
    assert "rewinding `epoch:1`" in text
    assert "prior" not in text.split("## Training")[1]
    control = controls.run_control(run, "reinit")
    assert "with the score `random`, and randomised by the control `reinit`: " in card(control, "b")
    moved = transplant.transplant_run(run)
    text = card(moved, "c")
    assert "by transplanting a deterministic network's ticket, pruned by the score `random`: " in text
    assert "prior `normal` of scale 1, KL temperature 0.1" in text


def test_the_card_is_one_that_the_hub_reads(run, tmp_path):
    facts = run.level(2).export(tmp_path / "x", licence="cc-by-4.0").facts
    found = ModelCard.load(tmp_path / "x" / "README.md")
    assert found.data.license == "cc-by-4.0"
    values = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert values == {
        name: pytest.approx(facts["measured"][name]) for name in ("accuracy", "nll", "ece", "mace", "brier")
    }
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"model.onnx", "predictor.py", "export.json", "README.md"}


def test_the_lines_of_the_card_run_without_the_library(run, images, tmp_path):
    run.level(2).export(tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    Image.fromarray(images[0, 0]).save(tmp_path / "x" / "image.png")
    code += "\nimport sys; assert not {'torch', 'pyro', 'pyro_lottery'} & set(sys.modules)\n"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "x", capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    best = own_probabilities(run, "draws", images)[0].argmax()
    assert f"'{run.classes[best] if run.classes else best}'" in found.stdout


def test_a_stranger_s_files_run_no_code(run, images, tmp_path):
    run.level(2).export(tmp_path / "x", "mean", "pt2")
    with pytest.raises(pl.UserError, match="is a program of torch operations; if you trust it, give --trust-code"):
        open_folder(tmp_path / "x")
    assert open_folder(tmp_path / "x", trust_code=True)(images[:1])["probs"].shape == (1, 10)
    run.level(2).export(tmp_path / "y", format="safetensors")
    path = tmp_path / "y" / "ticket.safetensors"
    tensors, info = load_tensors(path)
    info["config"]["arch"] = "os:system"
    files.save_tensors(path, tensors, info)
    with pytest.raises(pl.UserError, match="names code to import, os:system"):
        open_folder(tmp_path / "y")


def flipped(folder):
    path = folder / "level_00" / "posterior.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def cut(folder):
    path = folder / "level_00" / "ticket.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def of_another_network(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"lenet"', '"vgg11"'))


def naming_code(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"lenet"', '"os:system"'))


@pytest.mark.parametrize("damage", [flipped, cut, of_another_network, naming_code])
def test_damaged_and_hostile_runs_are_refused_as_load_run_refuses_them(run, tmp_path, damage):
    folder = shutil.copytree(run.folder.path, tmp_path / "run")
    damage(folder)
    expected = refusal(lambda: pl.load_run(folder).level(0).load_model())
    assert refusal(lambda: pl.load_run(folder).level(0).export(tmp_path / "x" / "y")) == expected
    assert not (tmp_path / "x").exists()


def refusal(work):
    with pytest.raises((pl.UserError, Damaged)) as found:
        work()
    return found.type, str(found.value)


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, self.weight - mean, self.bias, padding=1)


def test_weights_that_their_layers_transform_are_not_written_alone(tmp_path):
    """A plain network would compute with the pruned ones too."""
    images, labels = torch.randint(0, 256, (30, 3, 6, 6), dtype=torch.uint8), torch.arange(30) % 3
    network = nn.Sequential(Standardised(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    data = pl.data.from_tensors(images, labels, images, labels)
    run = pl.find_tickets(network, data, levels=1, epochs=1, milestones=(), eval_samples=2, run_dir=tmp_path / "run")
    for format in ("state_dict", "prune", "csr"):
        with pytest.raises(
            pl.UserError, match=r"'0.weight' is transformed before its layer uses it.*use pt2 or safetensors"
        ):
            run.level(1).export(tmp_path / "x", format=format)
    run.level(1).export(tmp_path / "x", format="pt2")
    run.level(0).export(tmp_path / "dense", format="state_dict")  # nothing of it is pruned
