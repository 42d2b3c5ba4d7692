"""Methods side by side: their budgets, the comparison by pairs, and the commands of the README."""

import importlib
import math
import re
import shlex
import sys
from contextlib import ExitStack

import pandas as pd
import pytest
import torch

import pyro_lottery as pl
from experiments import methods
from experiments.study import measures
from experiments.study import methods as ways
from experiments.study.statistics import interval
from plots.methods import pareto
from pyro_lottery.data import Split
from tests.support import ROOT, cifar10_jpeg, small_run

README = (ROOT / "experiments" / "README.md").read_text()
SHORT = shlex.split(
    "--epochs 10 --seeds 1 --densities 0.2 --train-size 100 --test-size 60 --batch-size 20 --eval-samples 2"
)
TINY = {"arch": "lenet", "dataset": "digits", "seed": 0}


def test_images_that_are_corrupted_are_of_all_classes():
    test = Split(
        torch.zeros(2000, 1, 2, 2, dtype=torch.uint8), torch.arange(2000) // 200, torch.zeros(1), torch.ones(1)
    )
    assert measures.some_of(test).labels.bincount().tolist() == [50] * 10
    assert len(measures.some_of(Split(test.inputs[:7], test.labels[:7], test.mean, test.std))) == 7


def test_all_methods_have_the_same_epochs():
    for name, method in methods.METHODS.items():
        config = method.config(0.05, 40, **TINY)
        assert config.epochs * len(method.counted()) == 40, name
        assert method.counted()[-1] == method.level == config.levels, name
    imp = methods.METHODS["imp"].config(0.05, 40, **TINY)
    assert (imp.epochs, imp.levels, imp.milestones) == (8, 4, (5, 7))
    assert (1 - imp.prune_fraction) ** 4 == pytest.approx(0.05, rel=1e-4)
    assert methods.METHODS["snip"].counted() == range(1, 2)  # no training before the score
    with pytest.raises(pl.UserError, match="--epochs 3 gives none to each of 5 trainings"):
        methods.METHODS["imp"].config(0.05, 3, **TINY)


def test_methods_are_compared_by_pairs_of_seeds():
    def rows(name, nlls):
        return [
            {"method": name, "wanted": 0.1, "seed": seed, "accuracy": 0.5, "nll": nll, "brier": 0.1, "ece": 0.1,
             "smooth_ece": 0.1, "shift_nll": 2.0, "ood_auroc": 0.5, "epochs": 4, "seconds": 2.0, "bytes": 9}
            for seed, nll in nlls.items()
        ]  # fmt: skip

    table = pd.DataFrame(rows("a", {0: 1.0, 1: 5.0, 2: 3.0}) + rows("b", {2: 3.3, 1: 5.2, 0: 1.1, 7: 9.0}))
    found = measures.compared(table, "a").set_index("method")
    low, high = interval([0.1, 0.2, 0.3])
    assert found.loc["b", "nll_low"] == pytest.approx(low)
    assert found.loc["b", "nll_high"] == pytest.approx(high)
    assert (found.loc["a", "nll_low"], found.loc["a", "nll_high"]) == (0.0, 0.0)
    assert found.loc["b", "nll"] == pytest.approx((3.3 + 5.2 + 1.1 + 9.0) / 4)
    slowed = table.assign(seconds=table["seconds"].where(table["seed"] != 1, 900.0))
    assert measures.compared(slowed, "a")["seconds"].tolist() == [2.0, 2.0]
    alone = measures.compared(table[table["seed"] == 0], "a").set_index("method")
    assert math.isinf(alone.loc["b", "nll_high"])  # one seed says nothing of the spread
    assert "| b | 50.0% | 1.100 |  | 0.100 |" in measures.markdown(
        measures.compared(table[table["seed"] == 0], "a"), "t", "a"
    )
    assert "| b | 50.0% | 4.650 | -0.048 to +0.448 |" in measures.markdown(measures.compared(table, "a"), "t", "a")


def test_two_processes_measure_a_level_once(tmp_path, monkeypatch):
    """The second level is locked, as if another process measured it, and is done after the others."""
    runs = [small_run(tmp_path / name, levels=0, epochs=1) for name in "abc"]
    places, measured, held = [(run.folder.path, 0) for run in runs], [], ExitStack()
    real = measures._measure

    def counted(level):
        measured.append(level.run.folder.path.name)
        return real(level)

    monkeypatch.setattr(measures, "_measure", counted)
    monkeypatch.setattr(measures, "sleep", lambda seconds: held.close())
    held.enter_context(runs[1].folder.derived("evaluation").lock())
    measures.measure_all([*places, places[0]])
    assert measured == ["a", "c", "b"]
    assert all(0 <= measures.measured(run.level(0))["ood_auroc"] <= 1 for run in runs)
    assert measured == ["a", "c", "b"]


def test_equal_seconds_by_hand(tmp_path):
    """a takes 2 seconds an epoch and 20 in all; b takes 1 second and has 5 trainings, c takes 9 and has 4."""
    rows = [
        {"method": name, "wanted": 0.1, "seed": seed, "epochs": 10, "seconds": 10 * each}
        for name, each in (("a", 2), ("b", 1), ("c", 9))
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows)
    chosen = {"a": methods.Method(trainings=1), "b": methods.Method(trainings=5), "c": methods.Method(trainings=4)}
    assert ways.of_equal_seconds(table, chosen) == {("a", 0.1): 10, ("b", 0.1): 20, ("c", 0.1): 4}
    with pytest.raises(pl.UserError, match=r"the table has no d at 0\.1; give methods_seeds\.csv"):
        ways.of_equal_seconds(table, chosen | {"d": methods.Method()})
    table.to_csv(tmp_path / "table.csv")
    with pytest.raises(pl.UserError, match=r"it has no density of 0\.2"):
        ways.read_table(tmp_path / "table.csv", [0.1, 0.2])
    with pytest.raises(pl.UserError, match=r"expected methods_seeds\.csv of this command"):
        ways.read_table(tmp_path / "none.csv", [0.1])


def test_the_pareto_front_by_hand():
    rows = pd.DataFrame({"seconds": [5, 1, 3, 4, 2], "nll": [0.5, 2.0, 1.0, 1.5, 2.5]})
    assert pareto(rows)["seconds"].tolist() == [1, 3, 5]


def test_unknown_methods_are_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(methods.main, ["--methods", "magic"], "--methods 'magic': unknown; choose among imp")
    refused(methods.main, ["--add", "no.such:THING"], "--add no.such:THING: expected package.module:NAME of a dict")


def test_a_table_of_other_methods_is_kept(refused, tmp_path):
    (tmp_path / "methods_seeds.csv").write_text("method,wanted\nimp,0.2\ngradual,0.2\n")
    arguments = ["-o", str(tmp_path), "--densities", "0.2", "--methods", "gradual"]
    refused(
        methods.main, arguments, "methods_seeds.csv has imp, which this table would lack; give another folder by -o"
    )


@pytest.mark.slow
def test_the_commands_and_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (code,) = re.findall(r"^```python\n(\"\"\"Pruning by the empirical.*?)^```$", README, re.M | re.S)
    assert code.count("\n") <= 40
    (tmp_path / "my_methods.py").write_text(code)
    commands = [shlex.split(c)[3:] for c in re.findall(r"^python -m experiments\.methods .*$", README, re.M)]
    assert len(commands) == 3
    names = ["--methods", "imp", "dense", "snip", "gradual", "dynamic", "one shot, swag", "one shot, laplace"]
    tables = []
    try:
        for arguments, own in zip(commands, (names, names, []), strict=True):
            assert methods.main([*arguments, *SHORT, *own]) == 0
            folder = (
                "equal_seconds"
                if "--equal-seconds" in arguments
                else "my_methods"
                if "--add" in arguments
                else "methods"
            )
            tables.append(pd.read_csv(f"runs/{folder}/methods_seeds.csv"))
    finally:
        sys.modules.pop("my_methods", None)
    before, after, table = tables
    wanted = ways.of_equal_seconds(before, {name: methods.METHODS[name] for name in names[1:]})
    assert after["epochs"].tolist() == [wanted[(name, 0.2)] for name in after["method"]]
    assert set(table["method"]) == {"imp", "one shot, Fisher", "gradual, Fisher"}
    assert (table["density"] - 0.2).abs().max() < 1e-3
    assert (table["epochs"] == 10).all()
    assert (table["bytes"] > 0).all()
    assert importlib.util.find_spec("plots.methods")
    assert (table[["smooth_ece", "shift_nll", "ood_auroc"]] > 0).all(axis=None)
    for name in ("methods.png", "methods.svg", "methods.csv", "methods.md"):
        assert (tmp_path / "runs" / "methods" / name).stat().st_size > 0


@pytest.mark.slow
def test_the_commands_of_the_gallery(tmp_path, monkeypatch):
    """With ten images of each class and two of their methods."""
    monkeypatch.chdir(tmp_path)
    cifar10_jpeg(tmp_path / "data" / "cifar10-jpeg", train=10, test=6)
    (tmp_path / "plots").symlink_to(ROOT / "plots")
    text = (ROOT / "plots" / "gallery" / "studies.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(c)[3:] for c in re.findall(r"^python -m experiments\.methods .*$", text, re.M)]
    assert len(commands) == 3
    for n, command in enumerate(commands):
        known = methods.parser().parse_args(command).methods or list(methods.METHODS)
        assert set(known) <= set(methods.METHODS)
        short = [*SHORT, "--epochs", "5"]
        assert methods.main([*command, *short, "--methods", known[0], known[-1], "--out", str(n)]) == 0
        assert pd.read_csv(f"{n}/methods.csv")["method"].tolist() == [known[0], known[-1]]
