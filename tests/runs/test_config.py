import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

import pyro_lottery as pl
from pyro_lottery.runs import config
from pyro_lottery.runs.cli import parse
from pyro_lottery.runs.config import Config, from_json, preset


def test_defaults_are_the_papers_but_for_one_sample_a_batch():
    c = parse("p", "d", [])
    paper = {
        "arch": "resnet18", "dataset": "cifar10", "levels": 20, "prune_fraction": 0.2, "epochs": 160, "lr": 1e-3,
        "milestones": (80, 120), "weight_decay": 1e-4, "batch_size": 128, "kl_temperature": 0.1, "init_scale": 0.01,
        "train_samples": 1, "eval_samples": 10, "score": "snr", "rewind": "init", "prior": "normal",
        "prior_scale": 1.0, "guide": "mean_field", "warmup_epochs": 0, "val_fraction": 0.0, "data_dir": "data",
    }  # fmt: skip
    assert {name: getattr(c, name) for name in paper} == paper


def test_options_beside_a_preset_win():
    quick = preset("quick")
    given = parse("p", "d", ["--epochs", "7", "--preset", "quick", "--milestones", "3", "5"])
    assert (given.epochs, given.milestones, given.dataset) == (7, (3, 5), quick.dataset)
    assert preset("default") == Config()
    assert preset("paper") == Config(train_samples=10)
    assert preset("paper").name() == "resnet18-cifar10-mean_field-snr-seed0-paper"
    with pytest.raises(pl.UserError, match="did you mean quick"):
        preset("qick")


def test_the_fast_preset_reaches_one_percent_in_nine_levels():
    fast = preset("fast")
    assert fast == Config(levels=9, prune_fraction=0.4)
    assert (1 - fast.prune_fraction) ** fast.levels == pytest.approx(0.01, rel=0.01)
    assert fast.name() == Config(prune_fraction=0.4).name() == "resnet18-cifar10-mean_field-snr-seed0-prune_fraction0.4"


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("p", "d", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for f in fields(Config):
        assert f"--{f.name.replace('_', '-')}" in text
        assert f.metadata["help"]


def test_saved_options_come_back():
    c = Config(arch="vgg11", milestones=(1, 2), epochs=3, val_fraction=0.1)
    assert config.from_json(json.loads(json.dumps(c.options())) | {"versions": {}}) == c


def test_names_are_readable_and_never_shared_by_different_runs():
    a, b = Config(arch="resnet20"), Config(arch="resnet20", lr=0.1)
    assert Path(a.run_dir) == Path("runs/resnet20-cifar10-mean_field-snr-seed0")
    assert a.run_dir != b.run_dir
    assert Config(image_size=64).name() == "resnet18-cifar10-mean_field-snr-seed0-image_size64"
    assert Config(levels=3).run_dir == Config(levels=5).run_dir, "more levels go on in the same folder"
    odd = Config(guide="pyro.infer.autoguide.AutoNormal", arch="timm:resnet10t").name()
    assert re.fullmatch(r"[\w.+-]+", odd)


def test_prune_to_is_the_density_of_the_last_level():
    config = parse("p", "d", ["--prune-to", "0.01", "--levels", "9", "--preset", "quick"])
    assert config == replace(config, prune_fraction=0.400516)
    assert (1 - config.prune_fraction) ** 9 == pytest.approx(0.01, rel=1e-4)
    assert Config(prune_to=0.8, levels=1) == Config(prune_fraction=0.2, levels=1)


def test_a_deterministic_guide_ranks_by_magnitude():
    assert Config(guide="deterministic").score == "magnitude"
    assert Config(guide="deterministic", score="random").score == "random"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune-fraction", "1.0"], "--prune-fraction must be between 0 and 1"),
        (["--prune-fraction", "0"], "--prune-fraction must be between 0 and 1"),
        (["--prune-to", "1"], "--prune-to must be between 0 and 1"),
        (["--prune-to", "0.1", "--levels", "0"], "--prune-to 0.1 needs --levels of at least 1"),
        (["--sparse", "never"], "unknown --sparse 'never'"),
        (["--dataset", "cifar"], "did you mean cifar10"),
        (["--rewind", "epoch:0"], "--rewind must be init, lr, epoch:K or restart:K"),
        (["--rewind", "epoch:9", "--epochs", "5"], "after the last of 5 epochs"),
        (["--rewind", "epoch:5", "--epochs", "5"], "leaves none of 5 epochs to train"),
        (["--rewind", "restart:6", "--epochs", "5"], "after the last of 5 epochs"),
        (["--rewind", "lr:2"], "--rewind must be init, lr, epoch:K or restart:K"),
        (["--kl-warmup-epochs", "5", "--epochs", "5"], "leaves none of 5 epochs at the full --kl-temperature"),
        (["--kl-warmup-epochs", "-1"], "--kl-warmup-epochs must be at least 0"),
        (["--milestones", "5", "3"], "--milestones must be increasing epochs"),
        (["--lr", "nan"], r"--lr must be a number of magnitude below 2\*\*63"),
        (["--estimator", "flipout"], "unknown --estimator 'flipout'"),
        (["--precision", "16"], "unknown --precision '16'"),
        (["--train-samples", "0"], "--train-samples must be at least 1"),
        (["--image-size", "0"], "--image-size must be from 1 to 2048"),
        (["--val-fraction", "1"], "--val-fraction must be from 0 to below 1"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(pl.UserError, match=message):
        parse("p", "d", arguments)


@pytest.mark.parametrize("arguments", [["--epochs", "many"], ["--no-such"], ["extra"], ["--epoch", "3"]])
def test_what_argparse_refuses_is_one_line_and_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("p", "d", arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": "5"}, {"epochs": 5.0}, {"epochs": True}, {"epochs": 2**63}, {"lr": "fast"}, {"lr": float("inf")},
        {"milestones": 3}, {"milestones": ["a"]}, {"milestones": None}, {"deterministic": 1}, {"arch": 3}, {"arch": None},
        {"data_dir": "a\0b"}, {"data_dir": "\udcff"}, {"dataset": ["digits"]}, {"rewind": {}},
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_named(options):
    name = next(iter(options)).replace("_", "-")
    with pytest.raises(pl.UserError, match=f"--{name} must be"):
        Config(**options)
    with pytest.raises(pl.UserError, match=f"--{name} must be"):
        from_json(Config().options() | options)


def test_whole_numbers_will_do_for_fractions_and_flags_take_no_value():
    assert Config(lr=1).name() == Config(lr=1.0).name()
    assert parse("prog", "", ["--deterministic"]).deterministic
    assert Config(deterministic=True, on_divergence="retry").name() == Config().name()
