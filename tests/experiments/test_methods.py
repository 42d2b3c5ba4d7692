"""Methods side by side: their budgets, the comparison by pairs, and the commands of the README."""

import importlib
import math
import re
import shlex
import sys

import pandas as pd
import pytest

import pyro_lottery as pl
from experiments import methods
from experiments.study.statistics import interval
from plots.methods import pareto
from tests.support import ROOT

README = (ROOT / "experiments" / "README.md").read_text()
TINY = {"arch": "lenet", "dataset": "digits", "seed": 0}


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
            {"method": name, "wanted": 0.1, "seed": seed, "accuracy": 0.5, "nll": nll, "brier": 0.1, "ece": 0.1, "epochs": 4, "seconds": 2.0, "bytes": 9}
            for seed, nll in nlls.items()
        ]  # fmt: skip

    table = pd.DataFrame(rows("a", {0: 1.0, 1: 5.0, 2: 3.0}) + rows("b", {2: 3.3, 1: 5.2, 0: 1.1, 7: 9.0}))
    found = methods.compared(table, "a").set_index("method")
    low, high = interval([0.1, 0.2, 0.3])
    assert found.loc["b", "nll_low"] == pytest.approx(low)
    assert found.loc["b", "nll_high"] == pytest.approx(high)
    assert (found.loc["a", "nll_low"], found.loc["a", "nll_high"]) == (0.0, 0.0)
    assert found.loc["b", "nll"] == pytest.approx((3.3 + 5.2 + 1.1 + 9.0) / 4)
    alone = methods.compared(table[table["seed"] == 0], "a").set_index("method")
    assert math.isinf(alone.loc["b", "nll_high"])  # one seed says nothing of the spread
    assert "| b | 50.0% | 4.650 | -0.048 to +0.448 |" in methods.markdown(methods.compared(table, "a"), "t", "a")


def test_the_pareto_front_by_hand():
    rows = pd.DataFrame({"seconds": [5, 1, 3, 4, 2], "nll": [0.5, 2.0, 1.0, 1.5, 2.5]})
    assert pareto(rows)["seconds"].tolist() == [1, 3, 5]


def test_unknown_methods_are_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(methods.main, ["--methods", "magic"], "--methods 'magic': unknown; choose among imp")
    refused(methods.main, ["--add", "no.such:THING"], "--add no.such:THING: expected package.module:NAME of a dict")


@pytest.mark.slow
def test_the_commands_and_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (code,) = re.findall(r"^```python\n(\"\"\"Pruning by the empirical.*?)^```$", README, re.M | re.S)
    assert code.count("\n") <= 40
    (tmp_path / "my_methods.py").write_text(code)
    commands = [shlex.split(c)[3:] for c in re.findall(r"^python -m experiments\.methods .*$", README, re.M)]
    assert len(commands) == 2
    sizes = {
        "epochs": 10,
        "seeds": 1,
        "densities": 0.2,
        "train-size": 100,
        "test-size": 60,
        "batch-size": 20,
        "eval-samples": 2,
    }
    short = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    names = {"imp", "dense", "snip", "gradual", "dynamic", "one shot, swag", "one shot, laplace"}
    more = [["--methods", *sorted(names)], []]
    try:
        for arguments, own in zip(commands, more, strict=True):
            assert methods.main([*arguments, *short, *own]) == 0
            names |= {"one shot, Fisher", "gradual, Fisher"} if not own else set()
    finally:
        sys.modules.pop("my_methods", None)
    table = pd.read_csv("runs/methods/methods_seeds.csv")
    assert set(table["method"]) == {"imp", "one shot, Fisher", "gradual, Fisher"}
    assert (table["density"] - 0.2).abs().max() < 1e-3
    assert (table["epochs"] == 10).all()
    assert (table["bytes"] > 0).all()
    assert importlib.util.find_spec("plots.methods")
    for name in ("methods.png", "methods.svg", "methods.csv", "methods.md"):
        assert (tmp_path / "runs" / "methods" / name).stat().st_size > 0
