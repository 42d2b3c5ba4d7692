import json
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import controls, evaluate, imp, report, sites, transplant
from pyro_lottery.controls import run_control
from pyro_lottery.errors import Damaged
from pyro_lottery.runs import build
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.loaded import check_levels
from tests.support import SMALL, TinyNet, small_run, tree

GUIDES = ["mean_field", "deterministic", "pyro.infer.autoguide.AutoNormal"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {g: small_run(root / g, guide=g, levels=1) for g in GUIDES}


@pytest.fixture(params=GUIDES)
def run(request, runs):
    return runs[request.param]


def test_a_loaded_network_predicts_the_bits_it_predicted_when_saved(run):
    # results.csv was written from the predictive probabilities of the living network; the loaded one must repeat them.
    data = run.load_data()
    for level in (0, 1):
        probs = run.level(level).load_model().predict(data.test, run.config.eval_samples, run.config.seed)
        row = run.results.iloc[level]
        assert pl.metrics.nll(probs, data.test.labels) == row["nll"]
        assert pl.metrics.mace(probs, data.test.labels) == row["mace"]


def test_every_draw_of_a_loaded_network_is_one_that_its_average_is_of(run):
    network, images = run.level(1).load_model(), run.load_data().test
    every = network.predict(images, 3, seed=5, aggregate=False)
    assert torch.equal((every.double().sum(0) / len(every)).float(), network.predict(images, 3, seed=5))
    assert len(every) == (1 if run.config.guide == "deterministic" else 3)


@pytest.mark.slow
def test_a_new_process_gives_the_same_bits(runs):
    code = (
        "import sys, torch, pyro_lottery as pl\n"
        "for run in map(pl.load_run, sys.argv[1:]):\n"
        "    probs = run.level(1).load_model().predict(run.load_data().test, 3, seed=5)\n"
        "    print(torch.get_num_threads(), probs.double().sum(0).tolist(), probs[7].tolist())"
    )
    paths = [str(run.folder.path) for run in runs.values()]
    printed = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    for line, run in zip(printed.splitlines(), runs.values(), strict=True):
        probs = run.level(1).load_model().predict(run.load_data().test, 3, seed=5)
        assert line == f"{torch.get_num_threads()} {probs.double().sum(0).tolist()} {probs[7].tolist()}"


def test_half_read_predictives_leave_no_mask_and_no_random_state_behind(run):
    network, images = run.level(1).load_model(), run.load_data().test
    expected = [p.probs for p in network.predictives(images, 3)]
    torch.manual_seed(7)
    undisturbed, after = torch.rand(3), torch.rand(3)
    torch.manual_seed(7)
    steps = zip(network.predictives(images, 3), run.level(0).load_model().predictives(images, 3), strict=True)
    found = []
    for one, _ in steps:
        if not found:
            assert torch.equal(torch.rand(3), undisturbed)
            assert all((value != 0).any() for value in run.level(0).load_model().guide().values())
            torch.manual_seed(7)
            torch.rand(3)
        found.append(one.probs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.rand(3), after)


def test_pruned_weights_of_a_loaded_network_are_zero(run):
    network = run.level(1).load_model()
    with pl.handlers.sparsify(network.mask):
        sample = network.guide()
    assert all((sample[s][~m] == 0).all() for s, m in network.mask.items())
    assert torch.equal(network.predict_mean(run.load_data().test), network.predict_mean(run.load_data().test))


def test_the_places_of_surviving_weights_are_found_once_until_the_mask_is_changed(run, monkeypatch):
    net, x, made = run.level(1).load_model(), run.load_data().test[:4], []
    handler = pl.handlers.sparsify
    monkeypatch.setattr("pyro_lottery.runs.trained.sparsify", lambda mask: made.append(mask) or handler(mask))
    whole = net.predict(x, num_samples=2)
    assert torch.equal(net.predict(x, num_samples=2), whole)
    assert torch.equal([p.probs for p in net.predictives(x, 2)][-1], whole)
    assert made[1:] == [net.mask], "after the empty one of the first prediction"
    (name, mask), *_ = net.mask.items()
    for changed in (lambda: net.mask.update({name: torch.zeros_like(mask)}), lambda: mask.numpy().fill(False)):
        before = mask.clone()
        changed()
        assert not torch.equal(net.predict(x, num_samples=2), whole)
        net.mask[name] = mask
        mask.copy_(before)
        assert torch.equal(net.predict(x, num_samples=2), whole)


def test_a_network_predicts_in_inference_mode_and_after_it(run):
    for first in (torch.inference_mode, torch.no_grad):
        net, x = run.level(1).load_model(), run.load_data().test[:4]
        with first():
            whole = net.predict(x, num_samples=2)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert torch.equal(net.predict(x, num_samples=2), whole)
    with torch.inference_mode():
        loaded = run.level(1).load_model()
        assert torch.equal(loaded.predict(x, num_samples=2), whole)


def test_a_loader_may_predict_with_the_network_that_reads_it(run):
    net, x = run.level(1).load_model(), run.load_data().test[:6]

    class Confident:
        def __iter__(self):
            yield x[net.predict(x, num_samples=2).amax(1) > 0]

    assert torch.equal(net.predict(Confident(), num_samples=2), net.predict(x, num_samples=2))


def test_runs_read_as_tables_and_names(run):
    assert run.results["level"].tolist() == [0, 1]
    assert run.level(1).history["epoch"].tolist() == [1, 2]
    assert run.level(0).posterior.loc["conv1.weight"].shape == (6, 1, 5, 5)
    assert run.config.arch == "lenet"
    with pytest.raises(pl.UserError, match="no finished level 7"):
        run.level(7)
    with pytest.raises(pl.UserError, match="no finished level is chosen; finish level 2 first"):
        check_levels(run, None, lowest=2)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(pl.UserError, match="is not a run folder"):
        pl.load_run(tmp_path)


def own_prior(site, shape):
    raise AssertionError("code that a config.json names has run")


_LEARNED = torch.nn.Parameter(torch.tensor(1.0))


def learned_prior(site, shape):
    return dist.Normal(0.0, _LEARNED)


def hyperprior(site, shape):
    return dist.Normal(0.0, pyro.sample("s", dist.HalfNormal(1.0)))


@pytest.mark.parametrize(
    ("prior", "message"), [("learned_prior", "has an nn.Parameter to learn"), ("hyperprior", "samples 's'")]
)
def test_a_prior_that_no_run_folder_can_keep_is_refused_on_the_command_line(prior, message, tmp_path, capsys):
    arguments = ["--arch", "lenet", "--dataset", "digits", "--run-dir", str(tmp_path / "run")]
    assert imp.main([*arguments, "--prior", f"tests.runs.test_loaded.{prior}"]) == 2
    assert f"--prior tests.runs.test_loaded.{prior} {message}" in capsys.readouterr().err


def test_code_that_has_changed_since_is_neither_resumed_nor_read(tmp_path, monkeypatch):
    code = """
import pyro_lottery as pl
from torch import nn

def build(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.{layer}, nn.Linear(8, num_classes))

prior = pl.priors.normal({scale})

def score(posterior):
    return {{name: value.abs() * {factor} for name, value in posterior.loc.items()}}
"""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"arch": "code_of_mine:build", "prior": "code_of_mine:prior", "score": "code_of_mine:score"}

    def train(layer="ReLU()", scale=1.0, factor=1.0):
        module = types.ModuleType("code_of_mine")
        exec(code.format(layer=layer, scale=scale, factor=factor), vars(module))
        monkeypatch.setitem(sys.modules, "code_of_mine", module)
        return small_run(tmp_path / "run", levels=0, epochs=1, **names)

    expected = train().level(0).load_model().predict(torch.zeros(1, 1, 8, 8), 2)
    for change, what in (
        ({"layer": "Tanh()"}, "another network, prior or likelihood"),
        ({"layer": "Dropout(0.1)"}, "another rate of dropout"),
        ({"scale": 1.1}, "another prior"),
        ({"factor": 2.0}, "another score"),
    ):
        with pytest.raises(pl.UserError, match=f"was started with other code at the import paths .* {what}"):
            train(**change)
        if "factor" not in change:  # which no reading needs
            with pytest.raises(pl.UserError, match=what):
                pl.load_run(tmp_path / "run", trust_code=True).level(0).load_model()
    train()
    found = pl.load_run(tmp_path / "run", trust_code=True).level(0).load_model()
    assert torch.equal(found.predict(torch.zeros(1, 1, 8, 8), 2), expected)


def test_code_that_a_run_folder_names_runs_only_where_it_is_trusted(tmp_path, capsys):
    """A run folder from somebody else: its config.json is not the reader's command line."""
    made = small_run(tmp_path / "run", levels=1, epochs=1)
    path, saved = str(made.folder.path), json.loads((tmp_path / "run/config.json").read_text())
    code = {"prior": "os.system", "guide": "os.system", "score": "os.system", "arch": "os:system"}
    for option, named in code.items():
        made.folder.save_config(saved | {option: named})
        run = pl.load_run(path)
        assert len(run.results) == 2, "numbers can be read"
        for use in (
            run.level(1).load_model,
            lambda run=run: run.initial(0),
            lambda run=run: run_control(run, "reinit"),
        ):
            with pytest.raises(pl.UserError, match=f"names code to import, {named}"):
                use()
        for command, more in ((evaluate, []), (controls, ["--control", "reinit"])):
            assert command.main([path, *more]) == 2
            assert "--trust-code" in capsys.readouterr().err
    made.folder.save_config(saved | {"prior": "tests.runs.test_loaded.own_prior"})
    with pytest.raises(pl.UserError, match=r"the prior of .* failed \(AssertionError: code that"):
        pl.load_run(path, trust_code=True).level(1).load_model()
    assert not (tmp_path / "run" / "controls").exists()


@pytest.mark.parametrize(
    "shape",
    [
        {"num_classes": 0}, {"num_classes": 2**40}, {"in_channels": True}, {"image_size": [2**20, 2**20]}, {"image_size": [4096, 4096], "in_channels": 4},
        {"image_size": 8}, {"image_size": [8]}, {"num_data": "many"}, {"other": 1},
    ],
)  # fmt: skip
def test_a_shape_that_no_data_have_is_refused(shape, run, tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_config(run.folder.config | {"data": run.folder.config["data"] | shape})
    with pytest.raises(pl.UserError, match=r"config\.json has no valid description of the run's data"):
        pl.load_run(tmp_path)


def test_a_run_on_the_largest_images_can_be_opened(run, tmp_path):
    largest = {"image_size": [4096, 4096], "in_channels": 3}
    RunFolder(tmp_path).save_config(run.folder.config | {"data": run.folder.config["data"] | largest})
    assert pl.load_run(tmp_path).shape.image_size == (4096, 4096)


def test_a_network_too_large_for_the_machine_is_refused_before_memory_is_taken(run):
    shape = replace(run.shape, num_classes=2**30)
    with pytest.raises(pl.UserError, match=r"--arch lenet for images of 1×8×8 and 1073741824 classes needs \d"):
        build.build(run.config, shape)


def test_a_run_on_another_machine_is_told_where_its_data_are_and_checks_them(tmp_path):
    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    tree(here, sizes=((8, 8), (8, 8)))
    options = {"dataset": "folder", "data_dir": str(here), "train_size": None, "levels": 1, "epochs": 1}
    run = small_run(tmp_path / "run", **options)
    shutil.copytree(here, there)
    shutil.move(here, other)
    with pytest.raises(pl.UserError, match="no folder train/"):
        evaluate.evaluate(run, samples=1)
    assert evaluate.evaluate(run, samples=1, data_dir=str(there))["uncertainty"]
    assert len(run_control(run, "reinit", [1], data_dir=str(there)).results) == 1
    next((other / "test").rglob("*.png")).unlink()
    for use in (
        lambda: evaluate.evaluate(run, samples=1, data_dir=str(other)),
        lambda: run_control(run, "shuffle_even", [1], data_dir=str(other)),
    ):
        with pytest.raises(pl.UserError, match="has other data than"):
            use()
    assert not (tmp_path / "run" / "controls" / "shuffle_even").exists()


def test_a_run_knows_the_names_of_its_classes(tmp_path):
    tree(tmp_path / "data", sizes=((8, 8), (8, 8)))
    for part in ("train", "test"):
        (tmp_path / "data" / part / "cat").rename(tmp_path / "data" / part / "NA")  # pandas would read a missing value
    options = {"dataset": "folder", "data_dir": str(tmp_path / "data"), "train_size": None, "levels": 1, "epochs": 1}
    config = Config(**SMALL | options | {"run_dir": str(tmp_path / "run")})
    run = imp.run_imp(config)
    assert run.folder.config["classes"] == ["NA", "dog"]
    assert run.classes == run.level(0).load_model().classes == ("NA", "dog")
    for level in (0, 1):  # the second is added to the table of the first
        evaluate.evaluate(run, [level], samples=1)
    table = (run.folder.path / "evaluation" / "classes.csv").read_text().splitlines()
    assert table[0] == "level,density,num_samples,label,class,images,accuracy,predicted"
    assert [line.split(",")[3:6] for line in table[1:]] == 2 * [["0", "NA", "3"], ["1", "dog", "3"]]
    assert "; 2 classes: NA, dog" in report.report([run])
    for part in ("train", "test"):
        (tmp_path / "data" / part / "NA").rename(tmp_path / "data" / part / "cat")
    with pytest.warns(UserWarning, match=r"started when the classes were named \['NA', 'dog'\]"):
        imp.run_imp(config)


@pytest.mark.parametrize("names", ["cat dog", ["0"] * 9, [1] * 10, ["\x1b[2J", *"123456789"]])
def test_names_of_classes_that_cannot_be_are_refused(names, run, tmp_path):
    RunFolder(tmp_path).save_config(run.folder.config | {"classes": names})
    with pytest.raises(pl.UserError, match=r"config\.json.* classes"):
        _ = pl.load_run(tmp_path).classes


def test_files_that_do_not_belong_together_make_no_network(run, tmp_path):
    shutil.copytree(run.folder.path, tmp_path / "run")
    shutil.copy(tmp_path / "run/level_00/ticket.safetensors", tmp_path / "run/level_01/ticket.safetensors")
    with pytest.raises(
        Damaged, match=r"level_01.ticket\.safetensors does not have the checksum that level\.json gives"
    ):
        pl.load_run(tmp_path / "run").level(1).load_model()


def test_scales_of_zero_are_refused_before_training(tmp_path):
    with pytest.raises(pl.UserError, match="--init-scale 1e-50 gives scales of 0"):
        small_run(tmp_path / "run", init_scale=1e-50)
    assert not (tmp_path / "run").exists()


def test_a_finished_level_whose_files_do_not_agree_is_named_by_whoever_reads_it(tmp_path, capsys):
    path = tmp_path / "run"
    small_run(path, levels=1, epochs=1)
    (path / "level_01" / "posterior.safetensors").unlink()
    with pytest.raises(Damaged, match="posterior"):
        pl.load_run(path).level(1)
    for command in (report.main, evaluate.main):
        assert command([str(path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert controls.main([str(path), "--control", "reinit"]) == 1


def test_nothing_is_written_where_a_run_folder_says_that_data_are(tmp_path):
    tree(tmp_path / "data", sizes=((8, 8), (8, 8)))
    options = {"dataset": "folder", "data_dir": str(tmp_path / "data"), "levels": 0, "train_size": None, "epochs": 1}
    run = imp.run_imp(Config(**SMALL | options | {"arch": "resnet20", "run_dir": str(tmp_path / "run")}))
    for kept in (tmp_path / "data").glob("*pyro_lottery*"):
        kept.unlink()
    for kept in (tmp_path / "data").glob(".*"):
        kept.unlink()
    before = sorted((tmp_path / "data").rglob("*"))
    assert len(pl.load_run(run.folder.path).load_data().train) > 0
    assert sorted((tmp_path / "data").rglob("*")) == before
    run.load_data(data_dir=tmp_path / "data")
    assert (tmp_path / "data" / "pyro_lottery.safetensors").exists(), "where the user says so, decoded images are kept"


def test_trying_a_network_out_leaves_a_frozen_batchnorm_frozen():
    net = TinyNet()
    net.bn.eval()
    build._try_out(net, "mine", build.Shape(3, 1, (4, 4), 60, 0))
    assert [net.training, net.bn.training, net.out.training] == [True, False, True]


OWN = "tests.nets.test_nets:Small"


def test_every_command_takes_a_network_of_the_users_own(tmp_path, capsys):
    path = tmp_path / "run"
    options = SMALL | {"arch": OWN, "levels": 1, "epochs": 1, "guide": "deterministic", "run_dir": str(path)}
    run = imp.run_imp(Config(**options))
    assert "tests.nets.test_nets_Small-digits" in Config(**options).name()
    assert run.results["total"].tolist() == [8 * 16] * 2
    probs = run.level(1).load_model().predict(run.load_data().test)
    assert pl.metrics.nll(probs, run.load_data().test.labels) == run.results["nll"][1]
    trusted = [str(path), "--trust-code"]
    assert report.main([str(path), "-o", str(tmp_path / "report.html")]) == 0
    assert f"--arch {OWN}" in (tmp_path / "report.html").read_text()
    for command, more in (
        (controls, ["--control", "reinit"]), (controls, ["--control", "shuffle_even"]),
        (transplant, ["--levels", "1"]), (evaluate, ["--samples", "1"]),
    ):  # fmt: skip
        assert command.main([str(path), *more]) == 2
        assert f"names code to import, {OWN}" in capsys.readouterr().err
        assert command.main([*trusted, *more]) == 0
    assert imp.main(["--arch", OWN, "--preset", "smoke", "--levels", "0", "--run-dir", str(tmp_path / "other")]) == 0
    assert sites.main(["--arch", OWN, "--dataset", "digits"]) == 0
    assert "1 prunable sites, 128 prunable weights" in capsys.readouterr().out


def test_a_network_of_the_users_own_must_give_a_logit_a_class(tmp_path, capsys):
    arguments = ["--arch", "tests.nets.test_nets:logits_too_few", "--dataset", "digits", "--run-dir"]
    assert imp.main([*arguments, str(tmp_path / "x")]) == 2
    assert "returns (1, 3) for one image; expected (1, 10)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
