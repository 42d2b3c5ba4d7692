"""The READMEs are a promise: every command and every Python block in them runs, the long ones shortened by options that win."""

import importlib
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import pyro_lottery.__main__ as listing
from experiments import claims, export_table, methods, odd_folders, odd_weights, own_data, timm_table
from experiments import command as experimenting
from experiments.benchmarks import candidates, estimators, exports, launches, layers, sparse, steps
from experiments.benchmarks.gpu import __main__ as gpu
from experiments.study.kept import LAYERS, LEVELS
from experiments.study.statistics import UNKNOWN
from experiments.study.verdicts.judge import CLAIMS
from plots import command as plotting
from pyro_lottery import diagnose, evaluate, export, imp
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.config import Config, preset
from tests import fingerprint
from tests.soak import __main__ as soak
from tests.support import ROOT, tree

predicting = importlib.import_module("pyro_lottery.predict")  # pyro_lottery.predict is the function of that name
FRONT, LIBRARY, EXPERIMENTS, BENCHMARKS, GALLERY, TESTS = (
    ROOT / folder / "README.md"
    for folder in ("", "pyro_lottery", "experiments", "experiments/benchmarks", "plots/gallery", "tests")
)
STUDIES = GALLERY.with_name("studies.md")
READMES = {path: path.read_text() for path in (FRONT, LIBRARY, EXPERIMENTS, BENCHMARKS, GALLERY, STUDIES, TESTS)}
README = "\n".join(READMES.values())
SHORT = ["--epochs", "1", "--levels", "1", "--train-samples", "1", "--eval-samples", "1", "--milestones", "1"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """Every command of a README's bash blocks, without comments and settings of the environment."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    words = [
        shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", part), comments=True) for line in lines for part in line.split(" && ")
    ]
    return list(dict.fromkeys(shlex.join(each) for each in words if each))


COMMANDS = list(dict.fromkeys(command for text in READMES.values() for command in commands(text)))
KINDS = {  # of commands, by the test that runs them
    "set up": r"pip |pytest",
    "list": r"python -m pyro_lottery$",
    "runs": r"python -m pyro_lottery\.imp (?!.*--devices)",
    "two ranks": r"python -m pyro_lottery\.imp .*--devices",  # by test_distributed.py
    "of runs": r"python -m pyro_lottery\.(controls|transplant|evaluate|diagnose|report|sites) ",
    "exports": r"python -m pyro_lottery\.(export|predict) ",
    "side by side": r"python -m (experiments|plots)\.bayesian_vs_deterministic ",
    "own data": r"python -m experiments\.own_data ",
    "speed": r"python -m (experiments\.benchmarks\.steps|plots\.speed) ",
    "sparse": r"python -m experiments\.benchmarks\.sparse ",
    "cost of exports": r"python -m experiments\.benchmarks\.exports ",
    "layers": r"python -m experiments\.benchmarks\.layers ",
    "launches": r"python -m experiments\.benchmarks\.launches$",
    "gpu": r"python -m experiments\.benchmarks\.gpu",  # by experiments/benchmarks/test_gpu.py
    "estimators": r"python -m experiments\.benchmarks\.estimators ",
    "nuts": r"python -m experiments\.nuts",  # by experiments/test_nuts.py
    "methods": r"python -m experiments\.methods ",  # by experiments/test_methods.py
    "paper": r"python -m (experiments|plots)\.(fig\d|table1|all|claims|squared_sum) ",
    "tables": r"python -m experiments\.(timm_table|export_table|odd_weights|odd_folders) ",
    "soak": r"python -m tests\.soak ",  # by soak/test_soak.py
    "reference": r"python -m pdoc ",  # by test_reference.py
    "fingerprint": r"python -m tests\.fingerprint ",
}
OF = {kind: [c for c in COMMANDS if re.match(pattern, c)] for kind, pattern in KINDS.items()}


def test_every_command_is_run_by_one_test():
    assert all(OF.values())
    assert sorted(command for several in OF.values() for command in several) == sorted(COMMANDS)


def test_commands_within_a_sentence_are_run_too():
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    named = [shlex.join(shlex.split(command)) for command in re.findall(r"`((?:python -m|pip|pytest) [^`]+)`", prose)]
    assert [c for c in named if c not in COMMANDS and not re.fullmatch(r"python -m [\w.]+", c)] == []


def test_every_block_is_of_a_kind_that_is_looked_at():
    for path, text in READMES.items():
        fences = re.findall(r"^```(.*)$", text, re.M)
        assert set(fences[::2]) <= {"bash", "python", "text", "bibtex"}, path
        assert set(fences[1::2]) <= {""}, path
        assert not re.search(
            r"^( {4}|\t)(python|pip|pytest) ", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
        )


def test_no_readme_is_forgotten():
    ignored = re.compile(r"/(\.|runs/|data/|build/)")
    assert {p for p in ROOT.rglob("README.md") if not ignored.search(str(p)[len(str(ROOT)) :])} == set(READMES) - {
        STUDIES
    }


def test_the_front_page_is_one_screen():
    text = READMES[FRONT]
    assert len(text) <= 6000
    assert len(blocks(text, "python")) == 1
    assert blocks(text, "python")[0].count("\n") <= 20
    first = blocks(text, "bash")[0].splitlines()
    assert ["pyro_lottery.imp" in first[0], "pytest" in first[1]] == [True, True]


def test_the_tree_of_the_front_page_is_there():
    folder, named = "", []
    for line in next(block for block in blocks(READMES[FRONT], "text") if "experiments/" in block).splitlines():
        if match := re.match(r"(\w+)/ ", line):
            folder = match[1]
            assert (ROOT / folder).is_dir()
        elif match := re.match(r"  (\w+(?: \w+)*)  ", line):
            named += [(folder, name) for name in match[1].split()]
    assert len(named) >= 20
    for folder, name in named:
        assert (ROOT / folder / name).is_dir() or (ROOT / folder / f"{name}.py").is_file(), name


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    text = READMES[path]
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith("https://"):
            file, _, section = link.partition("#")
            found = (path.parent / file).resolve() if file else path
            assert found.exists(), link
            if section:
                assert section in {anchor(title) for title in re.findall(r"^#+ (.*)$", found.read_text(), re.M)}, link


def test_every_module_that_is_named_exists():
    names = set(re.findall(r"python -m ((?:pyro_lottery|experiments|plots|tests)[\w.]*)", README)) - {
        "experiments.figN"
    }
    assert len(names) >= 15
    for name in names:
        assert importlib.util.find_spec(name) is not None, name


def test_what_the_front_page_counts_is_what_the_pages_behind_it_say():
    """Each line of "What is different here" names its page, where every number of the line stands too."""
    section = READMES[FRONT].split("## What is different here\n")[1].split("\n## ")[0]
    lines = re.findall(r"^- (.*?)(?=^- |\Z)", section, re.M | re.S)
    assert len(lines) == 5
    for line in lines:
        page = (ROOT / re.search(r"\]\((.*?)\)", line)[1]).read_text()
        numbers = re.findall(r"(?<![\w.,])\d[\d.,]*(?<![.,])", re.sub(r"\[.*?\]\(.*?\)", "", line))
        assert numbers
        missing = [n for n in numbers if not re.search(rf"(?<![\d.,]){re.escape(n)}(?![\d]|[.,]\d)", page)]
        assert missing == [], line


def test_the_rows_of_the_front_page_are_the_figures():
    frame = pd.read_csv(ROOT / "plots" / "gallery" / "reduced" / "fig1.csv")
    rows = {}
    for series in ("Bayesian, snr", "deterministic"):
        for quantity, form in (("test accuracy at the end (%)", "{:.1f} ± {:.1f} %, "), ("MACE", "{:.3f}")):
            for _, row in frame[(frame["series"] == series) & (frame["quantity"] == quantity)].iterrows():
                assert row["seeds"] == 3
                rows.setdefault(row["level"], []).append(form.format(row["mean"], row["std"]))
    for level, share in ((0, "100 %"), (3, "6.4 %"), (5, "1.0 %")):
        bayesian, mace, point, point_mace = rows[level]
        assert f"| {share} | {bayesian}{mace} | {point}{point_mace} |" in READMES[FRONT]


def test_set_up_is_what_continuous_integration_does():
    assert "pip install -e .[test]" in [command.replace("'", "") for command in commands(READMES[FRONT])]
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-e '.[test]'" in ci
    assert re.search(r"^pytest$", ci, re.M)


def test_extras_and_markers_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = {extra for command in OF["set up"] for extra in re.findall(r"\[(\w+)\]", command)}
    assert extras <= set(project["project"]["optional-dependencies"])
    markers = {m.partition(":")[0] for m in project["tool"]["pytest"]["ini_options"].get("markers", ())}
    for command in OF["set up"]:
        if command.startswith("pytest -m "):
            assert shlex.split(command)[2].removeprefix("not ") in markers


def test_the_list_of_commands(capsys):
    assert OF["list"] == ["python -m pyro_lottery"]
    print(listing.text())
    assert capsys.readouterr().out.count("python -m pyro_lottery.") == len(listing.COMMANDS)
    assert listing.main(["imp", "--arch", "lenet"]) == 2
    assert "did you mean python -m pyro_lottery.imp?" in capsys.readouterr().err


@pytest.mark.parametrize("command", OF["runs"])
def test_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[3:]
    if "DIR" in arguments:
        tree(tmp_path / "DIR", sizes=((8, 8), (8, 8)))
    elif "--data-dir" in arguments or "--dataset" not in arguments:  # CIFAR-10, and its copy as a folder of images
        arguments += ["--dataset", "digits", "--train-size", "40", "--test-size", "40"]
    else:
        arguments += ["--train-size", "40"]
    arguments += [*SHORT, "--arch", "lenet"]
    if "--schedule" in arguments:
        arguments += ["--epochs", "8"]  # of one step each, between which the mask moves
    assert imp.main(arguments) == 0
    assert "results, tickets" in capsys.readouterr().out


def run_as_written(command, monkeypatch, more=()):
    module, *arguments = shlex.split(command)[2:]
    monkeypatch.setattr("sys.argv", [module, *arguments, *more])
    monkeypatch.delitem(sys.modules, module, raising=False)  # or runpy warns that it runs it a second time
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    return code


@pytest.mark.slow
def test_python_and_the_commands_on_runs(tmp_path, monkeypatch, capsys):
    """The Python of every README in one folder, in which the runs that it names have been trained, by shorter commands."""
    monkeypatch.chdir(tmp_path)
    experiment, plot = OF["side by side"]
    assert run_as_written(experiment, monkeypatch, ["--epochs", "4", "--train-size", "400"]) == 0
    for path in Path("runs").iterdir():  # the shortened runs have other names
        path.rename(path.with_name(re.sub(r"seed0-.*", "seed0-quick", path.name)))
    for name in ("resnet18-digits-mean_field-snr-seed0-quick", "three"):  # the same network stands in for larger ones
        Path("runs", name).symlink_to("lenet-digits-mean_field-snr-seed0-quick")
    assert run_as_written(plot, monkeypatch) == 0
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("| lenet | digits |") == 6

    names = {}
    for path, text in READMES.items():
        python = blocks(text, "python")
        assert len(python) == {FRONT: 1, LIBRARY: 5, EXPERIMENTS: 1}.get(path, 0)
        if path == EXPERIMENTS:
            continue  # run by experiments/test_methods.py
        names = {"__name__": "__main__"} if python else names
        for block in python:
            exec(block, names)
        if path == FRONT:
            assert names["probs"].shape == (360, 10)
            out = capsys.readouterr().out
            assert float(re.search(r"'accuracy': ([0-9.]+)", out).group(1)) > 0.5
    net, start = names["pl"].create_model("lenet", 10, 1, image_size=8), names["run"].level(2).ticket
    net.load_state_dict({**start.start.loc, **start.net})
    torch.save(net.state_dict(), "weights.pt")
    for command in OF["of runs"]:
        module, *arguments = shlex.split(command)[2:]
        toy = ["--epochs", "1", "--train-size", "40", "--milestones", "1"] if "weights.pt" in arguments else []
        assert importlib.import_module(module).main([*arguments, *toy]) == 0, command
    Image.new("L", (8, 8), 100).save("image.png")
    capsys.readouterr()
    for command in OF["exports"]:
        module, *arguments = shlex.split(command)[2:]
        assert importlib.import_module(module).main(arguments) == 0, command
    assert capsys.readouterr().out.splitlines()[-2] == "image,class,probability,total,aleatoric,epistemic"


@pytest.mark.parametrize("command", OF["own data"])
def test_own_data(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy = ["--levels", "1", "--epochs", "1", "--milestones", "1", "--eval-samples", "1"]
    assert own_data.main([*shlex.split(command)[3:], *toy]) == 0
    assert "| 1 | 63.1 % |" in capsys.readouterr().out


def test_the_speed_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = run_imp(preset("quick", arch="lenet", levels=0, epochs=1, milestones=(), train_size=100))
    toy = ["--arch", "lenet", "--rounds", "1", "--batch-size", "4", "--draws", "4", "--evaluate", "4"]
    if not importlib.util.find_spec("torch_blue"):  # the extra bench is not for tests
        monkeypatch.setattr(candidates, "PEERS", ())
        monkeypatch.setattr(steps, "has_peers", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # the real one takes half a minute to start
    monkeypatch.setattr("pyro_lottery.machine.has_bf16", lambda device: False)  # so that --precision auto is 32
    *measure, plot = OF["speed"] if "plots" in OF["speed"][-1] else [OF["speed"][0], OF["speed"][2], OF["speed"][1]]
    assert len(measure) == 2
    for command in measure:
        more = ["--run", str(run.folder.path)] if "--run" in command else []
        more += ["--kernels", "1000"] if "--kernels" in command else []
        steps.main([*shlex.split(command)[3:], *toy, *more])
    out = capsys.readouterr().out
    assert out.count("| lenet, B 4 | 32 | local, pure torch |") == 2
    assert len(re.findall(r"\| lenet, B 4 \| ten weight samples", out)) == 1
    assert run_as_written(plot, monkeypatch) == 0
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def arguments_on_a_small_run(kind):
    """The arguments of a command on a run, whose place a small one takes."""
    (command,) = OF[kind]
    run = run_imp(preset("quick", arch="lenet", levels=0, epochs=1, milestones=(), train_size=100))
    shutil.copytree(run.folder.path, shlex.split(command)[3])
    return shlex.split(command)[3:]


def test_the_sparse_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sparse.main([*arguments_on_a_small_run("sparse"), "--rounds", "1", "--images", "4"])
    out = capsys.readouterr().out
    for what in ("step of lenet, B 64", "ten samples of lenet, B 4"):
        for mask in ("1.2% by snr", "1.2% by magnitude", "10.0% by snr", "10.0% by magnitude"):
            assert f"| {what} | 32 | sparse, {mask} |" in out


@pytest.mark.slow
def test_the_command_on_the_cost_of_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    arguments = arguments_on_a_small_run("cost of exports")
    arguments = arguments[: arguments.index("--levels")]
    exports.main([*arguments, "--rounds", "1", "--batch", "2", "--draws", "3"])
    out = capsys.readouterr().out
    for way in ("ONNX Runtime, mean", "ONNX Runtime, ten draws", "ONNX Runtime, moments", "sparse layers, ten draws"):
        assert f"| lenet, B 2 | 100.0% | {way} |" in out
    for prediction in ("mean", "10 draws", "3 draws", "moments"):
        assert f"| lenet | 100.0% | {prediction} |" in out
    assert "| lenet | 100.0% | ticket, int8 |" in out


def test_the_layers_command(tmp_path, monkeypatch, capsys):
    """It asserts that all libraries agree on each layer's outputs and gradients."""
    monkeypatch.chdir(tmp_path)
    layers.main([*arguments_on_a_small_run("layers"), "--rounds", "1", "--density", "0.3"])
    out = capsys.readouterr().out
    for layer in ("lenet conv1 6x1x5x5", "lenet fc2 84x120", "lenet, all of these"):
        for way in ("torch", "ours", "torch.sparse"):
            assert re.search(rf"^\| {layer} \| [\d.]+% \| {re.escape(way)} \|", out, re.M)


def test_the_launches_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command,) = OF["launches"]
    launches.main([*shlex.split(command)[3:], "--rounds", "1", "--arch", "vgg11", "--by-operation"])
    out = capsys.readouterr().out
    assert re.search(r"^\| vgg11 \| one weight sample at 1.2 % \| \d+ \| \d+ \|", out, re.M)
    assert re.search(r"^local: .*convolution_backward \+\d+", out, re.M)


def test_the_estimators_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command,) = OF["estimators"]
    toy = ["--arch", "lenet", "--dataset", "digits", "--shrink", "30", "--seeds", "1"]
    estimators.main([*shlex.split(command)[3:], *toy])
    assert len(re.findall(r"^\| equal (?:time|epochs) \|", capsys.readouterr().out, re.M)) == 6


@pytest.mark.parametrize("command", OF["paper"])
def test_the_papers_experiments(command, smoke_study, tmp_path, monkeypatch):
    """On the smoke protocol's runs, and in an empty folder of its own where it trains others."""
    monkeypatch.chdir(tmp_path)
    if "squared_sum" in command and "experiments" in command:
        Path("runs").mkdir()
    else:
        Path("runs").symlink_to(smoke_study)
    if " figures " in f"{command.partition('-o')[0]} ":
        shutil.copytree(smoke_study / "figures", "figures")
    toy = ["--protocol", "smoke"]
    if "experiments" in command and "claims" not in command:
        toy += ["--arch", "lenet", "--seeds", "1", "--dataset", "digits", "--figures", "figures"]
    elif "plots" in command and "--arch" in command:
        toy += ["--arch", "lenet"]
    if " plots/gallery " in command:
        Path("plots").mkdir()
        shutil.copytree(ROOT / "plots" / "gallery", "plots/gallery", ignore=shutil.ignore_patterns("*.png"))
        toy = toy if " runs " in command else []
    more = toy if "--protocol smoke" not in command else ["--figures", "figures"]
    assert run_as_written(command, monkeypatch, more) == 0


@pytest.mark.slow
def test_the_commands_that_write_tables(tmp_path, monkeypatch):
    """Each on its first cases, since every case is a test of its own; of a network's exports one, since all are in its table's test."""
    monkeypatch.chdir(tmp_path)
    weights = odd_weights.cases()[:2]
    monkeypatch.setattr(odd_weights, "cases", lambda: weights)
    monkeypatch.setattr(odd_folders, "CASES", odd_folders.CASES[:2])
    monkeypatch.setattr(timm_table, "_in_a_process", lambda name, timeout: timm_table.try_out(name))
    monkeypatch.setattr(timm_table, "MODELS", ["test_resnet"])
    monkeypatch.setattr(export_table, "WAYS", export_table.WAYS[:1])
    Path("plots", "gallery").mkdir(parents=True)
    for command in OF["tables"]:
        module, *arguments = shlex.split(command)[2:]
        more = {"timm_table": ["--models", "test_resnet"], "export_table": ["--networks", "lenet"]}.get(
            module.split(".")[1], []
        )
        assert importlib.import_module(module).main([*arguments, *more]) == 0, command
    assert {path.name for path in Path("plots", "gallery").iterdir()} == {
        "timm.csv",
        "timm.md",
        "exports.csv",
        "exports.md",
        "weights.md",
        "folders.md",
    }


def test_the_fingerprint_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingerprint, "fingerprint", lambda name, where, checkout: name)
    for command in OF["fingerprint"]:
        assert fingerprint.main(shlex.split(command)[3:]) == 0


def test_the_gallery_is_one_page():
    assert len(READMES[GALLERY]) <= 8000


def test_its_claims_are_those_that_were_judged(tmp_path):
    """Again from the evidence that is kept: the same table, byte for byte, whose rows the gallery shows."""
    kept = ROOT / "plots" / "gallery"
    assert claims.main([str(kept), "-o", str(tmp_path)]) == 0
    for name in ("claims.md", LEVELS, LAYERS):
        assert (tmp_path / name).read_bytes() == (kept / name).read_bytes()
    rows = [line for line in (kept / "claims.md").read_text().splitlines() if line.endswith("** |")]
    assert len(rows) == len(CLAIMS)
    assert [line for line in README.splitlines() if line.endswith("** |")] == rows
    assert rows[0] in READMES[GALLERY]
    judged = json.loads((tmp_path / "claims.json").read_text())
    known = sum(any(verdict != UNKNOWN for verdict in claim["networks"].values()) for claim in judged)
    for page in (FRONT, GALLERY):
        assert f"{known} of the paper's {len(rows)} claims have a verdict" in " ".join(READMES[page].split())


def test_every_option_it_names_exists():
    names = [name for f in fields(Config) for name in (f.name, *f.metadata["also"])]
    options = {f"--{name.replace('_', '-')}" for name in names} | {"--help", "--preset"}
    parsers = [
        module.parser()
        for module in (steps, estimators, claims, soak, evaluate, diagnose, gpu, export, predicting, methods)
    ]
    parsers += [experimenting.parser("all", ""), plotting.parser("fig1", "")]
    options |= {"--control", "--key", "--mask", "--save", "--compare"}
    options = options.union(*(parser._option_string_actions for parser in parsers))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README)) - options == set()
