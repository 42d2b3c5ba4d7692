"""The README is a promise: its commands and its Python run as written, the long ones shortened by options that win."""

import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import claims, own_data
from experiments import command as experimenting
from experiments.benchmarks import estimators
from experiments.benchmarks import steps as speed
from plots import command as plotting
from pyro_lottery import evaluate, imp
from pyro_lottery.imp import run_imp
from pyro_lottery.machine import resolve_precision
from pyro_lottery.runs.config import Config, preset
from tests.data.test_data import tree
from tests.soak import soak
from tests.support import DEADLOCK

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text() + (ROOT / "plots" / "gallery" / "README.md").read_text()
COMMANDS = [c for line in re.findall(r"^    ((?:pip|python) .*)$", README, re.M) for c in line.split(" && ")]
SHORT = ["--epochs", "1", "--levels", "1", "--train-samples", "1", "--eval-samples", "1", "--milestones", "1"]


def test_set_up_is_what_continuous_integration_does():
    assert "pip install -e '.[test]'" in COMMANDS
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-e '.[test]'" in ci
    assert re.search(r"^pytest$", ci, re.M)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pyro_lottery.imp" in c])
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
    if "--devices" in arguments:  # each rank starts the process's own command line
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        command = [sys.executable, "-m", "pyro_lottery.imp", *arguments]
        assert subprocess.run(command, timeout=DEADLOCK, check=True, capture_output=True, text=True).stderr == ""
        return
    assert imp.main(arguments) == 0
    assert "results, tickets" in capsys.readouterr().out


def run_as_written(command, monkeypatch, more=()):
    module, *arguments = shlex.split(command)[2:]
    monkeypatch.setattr("sys.argv", [module, *arguments, *more])
    monkeypatch.delitem(sys.modules, module, raising=False)  # or runpy warns that it runs it a second time
    runpy.run_module(module, run_name="__main__")


def test_python_and_the_side_by_side_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment, plot = (c for c in COMMANDS if "bayesian_vs_deterministic" in c)
    run_as_written(experiment, monkeypatch, ["--epochs", "4", "--train-size", "400"])
    for path in Path("runs").iterdir():  # the shortened runs have other names
        path.rename(path.with_name(re.sub(r"seed0-.*", "seed0-quick", path.name)))
    run_as_written(plot, monkeypatch)
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("| lenet | digits |") == 6

    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    assert blocks[0].count("\n") <= 25
    names = {}
    for block in blocks:
        exec(block, names)
    net, start = names["pl"].create_model("lenet", 10, 1, image_size=8), names["run"].level(2).ticket
    net.load_state_dict({**start.start.loc, **start.net})
    torch.save(net.state_dict(), "weights.pt")
    of_runs = ("controls", "transplant", "evaluate", "report", "sites")
    for command in (c for c in COMMANDS if re.match(rf"python -m pyro_lottery\.({'|'.join(of_runs)}) ", c)):
        module, *arguments = shlex.split(command)[2:]
        toy = ["--epochs", "1", "--train-size", "40"] if "weights.pt" in arguments else []
        assert importlib.import_module(module).main([*arguments, *toy, "--milestones", "1"] if toy else arguments) == 0
    assert names["probs"].shape == (360, 10)
    out = capsys.readouterr().out
    assert float(re.search(r"'accuracy': ([0-9.]+)", out).group(1)) > 0.5


@pytest.mark.parametrize("command", [c for c in COMMANDS if "experiments.own_data" in c])
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
        monkeypatch.setattr(speed, "PEERS", ())
        monkeypatch.setattr(speed, "has_peers", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # the real one takes half a minute to start
    commands = [c for c in COMMANDS if "experiments.benchmarks.steps" in c]
    assert len(commands) == 2
    for command in commands:
        more = ["--run", str(run.folder.path)] if "--run" in command else []
        more += ["--kernels", "1000"] if "--kernels" in command else []
        speed.main([*shlex.split(command)[3:], *toy, *more])
    out = capsys.readouterr().out
    precision = resolve_precision("auto", torch.device("cpu"))
    assert out.count(f"| lenet, B 4 | {precision} | local, pure torch |") == 2
    assert len(re.findall(r"\| lenet, B 4 \| ten weight samples", out)) == 1
    run_as_written(next(c for c in COMMANDS if "plots.speed" in c), monkeypatch)
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_the_estimators_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(next(c for c in COMMANDS if "experiments.benchmarks.estimators" in c))[3:]
    toy = ["--arch", "lenet", "--dataset", "digits", "--shrink", "30", "--seeds", "1"]
    estimators.main([*arguments, *toy])
    assert len(re.findall(r"^\| equal (?:time|epochs) \|", capsys.readouterr().out, re.M)) == 6


OF_THE_PAPER = [
    c for c in COMMANDS if re.search(r"experiments\.(fig|table|all|claims|squared)|plots\.(fig|table|squared)", c)
]


@pytest.mark.parametrize("command", OF_THE_PAPER)
def test_the_papers_experiments(command, smoke_study, tmp_path, monkeypatch):
    """On the smoke protocol's runs, and in an empty folder of its own where it trains others."""
    monkeypatch.chdir(tmp_path)
    if "squared_sum" in command and "experiments" in command:
        Path("runs").mkdir()
    else:
        Path("runs").symlink_to(smoke_study)
    toy = ["--protocol", "smoke"]
    if "experiments" in command and "claims" not in command:
        toy += ["--arch", "lenet", "--seeds", "1", "--dataset", "digits", "--figures", "figures"]
    elif "plots" in command and "--arch" in command:
        toy += ["--arch", "lenet"]
    with pytest.raises(SystemExit) as stopped:
        run_as_written(command, monkeypatch, toy if "--protocol smoke" not in command else ["--figures", "figures"])
    assert stopped.value.code == 0


def test_its_claims_are_those_of_the_gallery():
    verdicts = [
        line for line in (ROOT / "plots" / "gallery" / "claims.md").read_text().splitlines() if line.endswith("** |")
    ]
    assert len(verdicts) == len(claims.CLAIMS)
    assert [line for line in README.splitlines() if line in verdicts] == verdicts


def test_every_option_it_names_exists():
    fields = {f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__} | {"--help", "--preset"}
    parsers = [
        speed.parser(),
        estimators.parser(),
        claims.parser(),
        soak.parser(),
        evaluate.parser(),
        experimenting.parser("all", ""),
        plotting.parser("fig1", ""),
    ]
    fields |= {"--control", "--key", "--mask"}.union(*(parser._option_string_actions for parser in parsers))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - fields == set()
