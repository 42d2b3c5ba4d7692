import pytest
import safetensors.torch
import torch
from torch.nn.utils import prune

import pyro_lottery as pl
from pyro_lottery import levels, nets, prediction, tickets, transplant
from pyro_lottery.runs.build import dense_ticket, prepare
from pyro_lottery.runs.config import Config
from tests.support import SMALL, TinyNet, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return small_run(path, guide="deterministic")


def plain_network(ticket):
    """The deterministic masked network as plain PyTorch, without anything of this package but the architecture."""
    net = nets.create_model("lenet", 10, 1, image_size=8)
    net.load_state_dict({**ticket.start.loc, **ticket.net})
    with torch.no_grad():
        for name, mask in ticket.mask.items():
            net.get_parameter(name).mul_(mask)
    return net.eval()


def test_mean_weight_logits_before_training_are_the_masked_networks(run, monkeypatch):
    seen = {}

    def look(model, guide, data, ticket, level, **options):
        pl.guides.set_posterior_(guide, ticket.start)
        model.load_net_state(ticket.net)
        with pl.handlers.sparsify(ticket.mask):
            seen[level] = prediction.logits_mean(model, guide, data.test)
        raise RuntimeError("seen")

    monkeypatch.setattr(levels, "train_level", look)
    data = run.load_data()
    for level in (1, 2):
        with pytest.raises(RuntimeError, match="seen"):
            transplant.transplant_run(run, [level], run_dir=str(run.folder.path.parent / f"look{level}"))
        net = plain_network(run.level(level).ticket)
        x, _ = pl.data.batch(data.test, torch.arange(len(data.test)), "none", torch.Generator())
        with torch.no_grad():
            assert torch.allclose(seen[level], net(x), atol=1e-5)


def test_one_variational_training_a_level_from_the_tickets_values(run):
    found = transplant.transplant_run(run)
    assert found.folder.path == run.folder.path / "transplant"
    assert found.results["level"].tolist() == [1, 2]
    assert found.config.guide == "mean_field"
    usual = prepare(found.config).dense.start.scale
    for level in (1, 2):
        ticket, source = found.level(level).ticket, run.level(level).ticket
        for name, mask in source.mask.items():
            assert torch.equal(ticket.mask[name], mask)
            assert torch.equal(ticket.start.loc[name], source.start.loc[name])
            assert torch.equal(ticket.start.scale[name], torch.where(mask, usual[name], 0.0))
        assert found.level(level).posterior.scale is not None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_any_state_dict_is_a_source(run, tmp_path, suffix, capsys):
    ticket = run.level(2).ticket
    state = plain_network(ticket).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        safetensors.torch.save_file(state, path)
    toy = ["--arch", "lenet", "--preset", "smoke", "--run-dir", str(tmp_path / "run")]
    assert transplant.main([str(path), *toy]) == 0
    found = pl.load_run(tmp_path / "run").level(0).ticket
    assert all(torch.equal(found.mask[n], m) for n, m in ticket.mask.items())
    assert all(torch.equal(found.start.loc[n], t) for n, t in ticket.start.loc.items())
    assert found.start.scale is not None


def test_a_mask_file_wins_over_zeros(run, tmp_path):
    ticket = run.level(1).ticket
    state = {**run.level(0).ticket.start.loc, **run.level(0).ticket.net}
    torch.save(state, tmp_path / "w.pt")
    safetensors.torch.save_file({n: m.to(torch.uint8) for n, m in ticket.mask.items()}, tmp_path / "m.safetensors")
    options = ["--arch", "lenet", "--preset", "smoke", "--run-dir", str(tmp_path / "run")]
    assert transplant.main([str(tmp_path / "w.pt"), "--mask", str(tmp_path / "m.safetensors"), *options]) == 0
    found = pl.load_run(tmp_path / "run").level(0).ticket
    assert all(torch.equal(found.mask[n], m) for n, m in ticket.mask.items())


@pytest.mark.filterwarnings("ignore:.*all weights of fc1.weight are 0")
def test_other_weights_are_another_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = {**run.level(0).ticket.start.loc, **run.level(0).ticket.net}
    for name, sparse in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        torch.save(state | {"fc1.weight": state["fc1.weight"] * (0.0 if sparse else 1.0)}, f"{name}/weights.pt")
        assert transplant.main([f"{name}/weights.pt", "--arch", "lenet", "--preset", "smoke"]) == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert len({pl.load_run(folder).results["remaining"][0] for folder in folders}) == 2
    options = ["--arch", "lenet", "--preset", "smoke", "--run-dir"]
    assert (
        transplant.main(["a/weights.pt", *options, str(folders[0])])
        + transplant.main(["b/weights.pt", *options, str(folders[0])])
        == 2
    ), "one of the two is another's folder"
    assert "holds tickets of another transplant" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_bad_input_is_one_line(run, tmp_path, refused):
    state = plain_network(run.level(1).ticket).state_dict()
    files = {
        "missing": {n: t for n, t in state.items() if n != "fc1.weight"},
        "unmatched": state | {"fc9.weight": torch.ones(1)},
        "shape": state | {"fc1.weight": torch.ones(2, 2)},
        "list": [1, 2],
        "number": {1: torch.ones(1)},
        "complex": state | {"fc1.weight": torch.ones(2, dtype=torch.complex64)},
        "sparse": state
        | {"fc1.weight": torch.sparse_coo_tensor([[0], [1]], [1.0], (2**20, 2**20), check_invariants=True)},
        "pruned": {"fc1.weight_orig": torch.ones(2, 2), "fc1.weight_mask": torch.ones(3)},
        "bomb": Bomb(),
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "half.safetensors").write_bytes(b"half")
    bayesian = small_run(tmp_path / "bayes", levels=0, epochs=1)
    options = ["--arch", "lenet", "--preset", "smoke", "--run-dir", str(tmp_path / "never")]
    path = str(run.folder.path)
    for arguments, message in [
        ([str(tmp_path / "missing.pt"), *options], "fc1.weight is missing"),
        ([str(tmp_path / "unmatched.pt"), *options], "fc9.weight is not in the network"),
        ([str(tmp_path / "shape.pt"), *options], "fc1.weight is (2, 2), but the network's is ("),
        ([str(tmp_path / "list.pt"), *options], "has no state_dict"),
        ([str(tmp_path / "number.pt"), *options], "has no state_dict"),
        ([str(tmp_path / "complex.pt"), *options], "fc1.weight is a torch.complex64 tensor"),
        ([str(tmp_path / "sparse.pt"), *options], "sparse.pt: fc1.weight is a sparse matrix"),
        (
            [str(tmp_path / "pruned.pt"), *options],
            "fc1.weight_mask has shape (3,), but fc1.weight_orig has shape (2, 2)",
        ),
        ([str(tmp_path / "bomb.pt"), *options], "cannot be read as a state_dict"),
        ([str(tmp_path / "half.safetensors"), *options], "cannot be read as a state_dict"),
        ([str(tmp_path / "none.pt"), *options], "does not exist"),
        (["x" * 5000, *options], "File name too long"),
        ([str(tmp_path / "missing.pt"), *options, "--levels", "1"], "--levels is for run folders"),
        ([path, "--levels", "9"], "--levels 9: "),
        ([path, "--preset", "smoke"], "--preset is for files"),
        ([path, "--guide", "deterministic"], "a transplant needs a Bayesian guide"),
        ([str(bayesian.folder.path)], "transplants need a run with --guide deterministic"),
    ]:
        refused(transplant.main, arguments, message)
    torch.save(state, tmp_path / "w.pt")
    masks = {name: torch.ones_like(state[name]) for name in run.level(1).ticket.mask}
    for value, message in ((0.3, "must hold only 0 and 1"), (0.0, "the mask keeps no weight")):
        torch.save({name: value * mask for name, mask in masks.items()}, tmp_path / "m.pt")
        refused(transplant.main, [str(tmp_path / "w.pt"), *options, "--mask", str(tmp_path / "m.pt")], message)
    assert not (tmp_path / "never").exists(), "nothing is written for a ticket that cannot be made"


def test_a_transplant_of_its_own_bayesian_start_is_the_identity():
    config = Config(**SMALL | {"run_dir": "unused"})
    dense = prepare(config).dense
    again = tickets.transplant({**dense.start.loc, **dense.net}, dense.mask, dense)
    assert all(torch.equal(again.start.loc[n], t) for n, t in dense.start.loc.items())
    assert all(torch.equal(again.start.scale[n], t) for n, t in dense.start.scale.items())


@pytest.mark.filterwarnings("default")  # or a warning would not become a line
def test_the_command_reads_a_checkpoint_of_a_wrapped_network(run, tmp_path, capsys):
    ticket = run.level(1).ticket
    state = {f"module.{name}": value for name, value in plain_network(ticket).state_dict().items()}
    other = {name: torch.ones_like(value) for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": other, "epoch": 3}, tmp_path / "w.pt")
    toy = ["--arch", "lenet", "--preset", "smoke", "--epochs", "1", "--run-dir"]
    assert transplant.main([str(tmp_path / "w.pt"), *toy, str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    kept, total = run.results["remaining"][1], run.results["total"][1]
    assert (
        f"{total - kept:,} of {total:,} prunable weights are 0 and count as pruned: density {kept / total:.4%}" in out
    )
    assert "warning: " in err
    assert "names are read without the prefix module." in err
    assert "'state_dict'; the key can name another entry: state_dict_ema" in err
    found = pl.load_run(tmp_path / "run").level(0).ticket
    assert all(torch.equal(found.start.loc[n], t) for n, t in ticket.start.loc.items())
    assert pl.load_run(tmp_path / "run").results["remaining"][0] == kept
    assert transplant.main([str(tmp_path / "w.pt"), *toy, str(tmp_path / "ema"), "--key", "state_dict_ema"]) == 0
    assert bool((pl.load_run(tmp_path / "ema").level(0).ticket.start.loc["fc1.weight"] == 1).all())


def test_folders_of_other_libraries_are_no_runs(run, tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    assert transplant.main([str(tmp_path)]) == 2
    assert "is a folder with model.safetensors; give a file of weights" in capsys.readouterr().err
    assert transplant.main([str(run.folder.path), "--key", "model"]) == 2
    assert "--key is for files" in capsys.readouterr().err


def test_the_masks_in_a_file_of_torchs_pruning_are_those_of_the_ticket(tmp_path):
    def ticket(net):
        torch.save(net.state_dict(), tmp_path / "w.pt")
        model = pl.BayesianClassifier(TinyNet(), num_data=60)
        return transplant.ticket_of(
            *transplant.read(tmp_path / "w.pt"), dense_ticket(model, pl.guides.mean_field(model))
        )

    net = TinyNet()
    with torch.no_grad():
        net.hidden.weight[0] = 0  # these survive, though they are 0
        net.conv.weight[0] = 0  # without a mask, zeros count as pruned
    kept = torch.rand(net.hidden.weight.shape) < 0.5
    kept[0] = True
    prune.custom_from_mask(net.hidden, "weight", kept)
    assert torch.equal(ticket(net).mask["hidden.weight"], kept)
    assert torch.equal(ticket(net).mask["conv.weight"], net.conv.weight != 0)

    prune.random_unstructured(net.out, "weight", amount=9)
    with pytest.warns(UserWarning, match=r"out\.weight cannot be pruned here .* begin at 0 and are trained"):
        found = ticket(net)
    assert int((found.start.loc["out.weight"] == 0).sum()) == 9
    assert torch.equal(found.mask["hidden.weight"], kept)
