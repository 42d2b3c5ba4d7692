import json

import pytest
import safetensors.torch
import torch

import pyro_lottery as pl
from pyro_lottery import controls, imp, nets, report, transplant, weights
from pyro_lottery.runs.build import prepare
from pyro_lottery.runs.config import Config
from pyro_lottery.weights import pretrained
from tests.support import SMALL, TinyNet, same, small_run


def trained(net):
    """A network's state dict with every value changed, as after some training."""
    return {
        n: t + (0.1 + 0.1 * torch.rand(t.shape) if t.is_floating_point() else 1) for n, t in net.state_dict().items()
    }


def start(net, state, path, **wrapped):
    torch.save(state, path)
    pretrained.start_from_(net, weights.load(path))
    return net.state_dict()


def test_every_value_of_the_file_is_the_networks_zeros_too(tmp_path):
    state = trained(TinyNet())
    state["hidden.weight"][:, ::2] = 0
    assert same(start(TinyNet(), state, tmp_path / "w.pt"), state)
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    assert same(start(TinyNet(), doubles, tmp_path / "w.pt"), state)
    with pytest.warns(UserWarning, match="without the prefix module"):
        assert same(start(TinyNet(), {f"module.{n}": t for n, t in state.items()}, tmp_path / "w.pt"), state)


HEAD = {"out.weight", "out.bias"}


@pytest.mark.parametrize(
    ("file", "said"), [(trained(TinyNet(7)), "has a classifier for 7 classes"), (None, "has no classifier")]
)
def test_a_classifier_for_other_classes_and_that_alone_stays_as_it_was(file, said, tmp_path):
    state = file or {name: value for name, value in trained(TinyNet()).items() if name not in HEAD}
    net = TinyNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.warns(UserWarning, match=f"{said}; out.weight, out.bias keep their initial values"):
        found = start(net, state, tmp_path / "w.pt")
    assert all(torch.equal(found[name], (before if name in HEAD else state)[name]) for name in before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"conv.weight": torch.ones(4, 3, 3, 3)},
            r"conv.weight is \(4, 3, 3, 3\), but the network's is \(4, 1, 3, 3\)",
        ),
        ({"out.weight": torch.ones(3, 9)}, r"out.weight is \(3, 9\), but the network's is \(3, 6\)"),
        ({"out.weight": None}, "out.weight is missing"),
        ({"hidden.bias": None}, "hidden.bias is missing"),
        ({"aux.weight": torch.ones(1)}, "aux.weight is not in the network"),
        ({"hidden.bias": torch.full((6,), torch.inf)}, "hidden.bias holds values that are not finite"),
        (
            {"hidden.weight": torch.ones(6, 16, dtype=torch.int8)},
            "hidden.weight is torch.int8, perhaps a quantised weight",
        ),
    ],
)
def test_what_else_differs_is_named_and_nothing_is_changed(changed, message, tmp_path):
    state = trained(TinyNet()) | changed
    net = TinyNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(pl.UserError, match=message):
        start(net, {name: value for name, value in state.items() if value is not None}, tmp_path / "w.pt")
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in HEAD)


@pytest.mark.filterwarnings("ignore:.*has a classifier for 7 classes")
def test_a_timm_network_fine_tuned_from_other_classes(tmp_path):
    state = trained(pl.create_model("timm:test_resnet", 7, 1, 32))
    net = pl.create_model("timm:test_resnet", 3, 1, 32)
    found = start(net, state, tmp_path / "w.pt")
    left = [
        name
        for name in found
        if not torch.equal(found[name], state[name].reshape(-1)[: found[name].numel()].view_as(found[name]))
    ]
    assert left == ["fc.weight", "fc.bias"]


def test_a_run_begins_rewinds_and_resumes_with_the_files_values(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = trained(nets.create_model("lenet", 10, 1, 8))
    state["conv1.weight"][:, :, ::2] = 0
    torch.save({"model": state, "ema": trained(nets.create_model("lenet", 10, 1, 8))}, "w.pt")
    options = SMALL | {"levels": 1, "epochs": 1, "pretrained": "w.pt", "pretrained_key": "model"}
    run = imp.run_imp(Config(**options))
    dense, later = run.level(0).ticket, run.level(1).ticket
    usual = prepare(Config(**SMALL)).dense
    assert all(bool(mask.all()) for mask in dense.mask.values()), "zeros are no mask"
    assert same(dense.start.loc, state)
    assert same(dense.start.scale, usual.start.scale)
    assert all(torch.equal(later.start.loc[n], state[n] * m) for n, m in later.mask.items())

    checksum = json.loads((run.folder.path / "config.json").read_text())["pretrained_checksum"]
    name = run.folder.path.name
    assert name.startswith("lenet-digits-mean_field-snr-seed0-pretrained-w-model-")
    assert name.endswith(f"-{checksum}")
    results = run.results
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w.pt").rename("elsewhere/w.pt")
    again = imp.run_imp(Config(**options | {"pretrained": "elsewhere/w.pt", "run_dir": str(run.folder.path)}))
    assert again.results.equals(results), "where the file is does not matter"

    for given in ({"pretrained_key": "ema"}, {"pretrained": None, "pretrained_key": None}):
        with pytest.raises(pl.UserError, match=f"was started from the weights {checksum}, but --pretrained gives"):
            imp.run_imp(Config(**options | {"pretrained": "elsewhere/w.pt", "run_dir": str(run.folder.path)} | given))
    (tmp_path / "elsewhere" / "w.pt").unlink()
    data = run.load_data()
    probs = run.level(1).load_model().predict(data.test, run.config.eval_samples, run.config.seed)
    assert pl.metrics.nll(probs, data.test.labels) == run.results["nll"][1]
    assert same(run.initial(run.config.seed).start.loc, usual.start.loc), "reinit draws random values"
    kept = controls.run_control(run, "shuffle_layerwise", [1]).level(1).ticket
    assert all(torch.equal(kept.start.loc[n], state[n] * m) for n, m in kept.mask.items())
    assert controls.run_control(run, "reinit", [1]).results["remaining"][0] == results["remaining"][1]
    assert "--pretrained w.pt --pretrained-key model" in report.command(run)


@pytest.mark.filterwarnings("default")  # or a warning would not become a line
def test_the_command(tmp_path, capsys):
    toy = ["--arch", "lenet", "--preset", "smoke", "--levels", "0", "--run-dir", str(tmp_path / "run")]
    safetensors.torch.save_file(trained(nets.create_model("lenet", 7, 1, 8)), tmp_path / "w.safetensors")
    assert imp.main([*toy, "--pretrained", str(tmp_path / "w.safetensors")]) == 0
    err = capsys.readouterr().err
    assert "has a classifier for 7 classes; fc3.weight, fc3.bias keep their initial values" in err
    for arguments, message in (
        (["--pretrained", str(tmp_path / "no.pt")], "no.pt does not exist"),
        (["--pretrained", str(tmp_path)], "it is a folder"),
        (["--pretrained-key", "ema"], "give --pretrained too"),
        ([], "was started from the weights "),
    ):
        assert imp.main([*toy, *arguments]) == 2
        found = capsys.readouterr().err.splitlines()
        assert message in found[-1]
    with pytest.raises(SystemExit):
        transplant.main([str(tmp_path / "w.safetensors"), "--pretrained", "w.pt"])


def test_a_ticket_of_ones_own_is_a_start_without_its_mask(tmp_path):
    run = small_run(tmp_path / "run", levels=1, epochs=1)
    path = run.folder.level(1).path / "ticket.safetensors"
    options = {"levels": 0, "epochs": 1, "pretrained": str(path), "run_dir": str(tmp_path / "other")}
    found = imp.run_imp(Config(**SMALL | options)).level(0).ticket
    assert same(found.start.loc, run.level(1).ticket.start.loc)
    assert all(bool(mask.all()) for mask in found.mask.values())


def test_a_transplant_of_a_pretrained_run_needs_no_file(tmp_path):
    torch.save(trained(nets.create_model("lenet", 10, 1, 8)), tmp_path / "w.pt")
    options = {"levels": 1, "epochs": 1, "guide": "deterministic", "pretrained": str(tmp_path / "w.pt")}
    run = small_run(tmp_path / "run", **options)
    (tmp_path / "w.pt").unlink()
    assert same(transplant.transplant_run(run).level(1).ticket.start.loc, run.level(1).ticket.start.loc)
