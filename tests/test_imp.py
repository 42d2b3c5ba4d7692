import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import controls, files, imp, kernels, nets, transplant, untrusted
from pyro_lottery.errors import Damaged, Stopped
from pyro_lottery.runs import build
from pyro_lottery.runs.checkpoint import LevelHooks
from pyro_lottery.runs.config import Config, preset
from pyro_lottery.runs.folder import RunFolder
from tests.support import DEADLOCK, SMALL, fingerprint, small_run


class TenWeights(nn.Module):
    """Ten prunable weights: a linear layer from two features to five; the classifier and biases are not pruned."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 10)

    def forward(self, x):
        features = torch.stack([x[:, 0, :, :4].mean((1, 2)), x[:, 0, :, 4:].mean((1, 2))], 1)
        return self.head(self.norm(self.layer(features)))


def by_position(posterior):
    """A score known beforehand: a weight is worth its position."""
    return {n: torch.arange(float(t.numel())).view(t.shape) for n, t in posterior.loc.items()}


@pytest.fixture
def ten_weights(monkeypatch):
    monkeypatch.setitem(nets._NETS, "ten", lambda classes, channels, size, patch: TenWeights())


@pytest.mark.parametrize("guide", ["mean_field", "deterministic", "pyro.infer.autoguide.AutoNormal"])
def test_the_whole_loop_on_ten_weights_counted_by_hand(guide, tmp_path, ten_weights):
    config = Config(**SMALL | {
        "arch": "ten", "levels": 5, "guide": guide, "run_dir": str(tmp_path / "run"),
        "score": "tests.test_imp.by_position",
    })  # fmt: skip
    run = imp.run_imp(config)
    # ⌈0.2·10⌉ = 2, ⌈0.2·8⌉ = 2, ⌈0.2·6⌉ = 2, ⌈0.2·4⌉ = 1, ⌈0.2·3⌉ = 1 weights go, the first positions first.
    survivors = [10, 8, 6, 4, 3, 2]
    assert run.results["remaining"].tolist() == survivors
    assert run.results["density"].tolist() == [n / 10 for n in survivors]
    assert (run.results["total"] == 10).all()
    start = run.level(0).ticket
    for level, count in enumerate(survivors):
        ticket = run.level(level).ticket
        mask = ticket.mask["layer.weight"]
        assert list(ticket.mask) == ["layer.weight"]
        assert mask.flatten().tolist() == [False] * (10 - count) + [True] * count
        # a level starts at mask × rewind point, bit for bit, normalisation included
        for sites, first in ((ticket.start.loc, start.start.loc), (ticket.start.scale, start.start.scale)):
            if sites is None:
                assert guide == "deterministic"
                continue
            assert torch.equal(sites["layer.weight"], first["layer.weight"] * mask)
            assert all(torch.equal(sites[n], first[n]) for n in ("layer.bias", "head.weight", "head.bias"))
        assert all(torch.equal(ticket.net[n], t) for n, t in start.net.items())
        posterior = run.level(level).posterior
        assert (posterior.loc["layer.weight"][~mask] == 0).all()
        assert posterior.scale is None or (posterior.scale["layer.weight"][~mask] == 0).all()
        assert (posterior.loc["layer.weight"][mask] != start.start.loc["layer.weight"][mask]).all()


def test_the_score_decides_by_the_trained_posterior(tmp_path, ten_weights):
    run = small_run(tmp_path / "run", arch="ten", levels=1)
    posterior = run.level(0).posterior
    snr = (posterior.loc["layer.weight"].abs() / posterior.scale["layer.weight"]).flatten()
    pruned = set((~run.level(1).ticket.mask["layer.weight"]).flatten().nonzero().flatten().tolist())
    assert pruned == set(snr.argsort()[:2].tolist())


def test_learning_rate_rewinding_keeps_the_trained_values(tmp_path, ten_weights):
    run = small_run(tmp_path / "run", arch="ten", levels=2, rewind="lr")
    for level in (1, 2):
        mask = run.level(level).ticket.mask["layer.weight"]
        before, ticket = run.level(level - 1).posterior, run.level(level).ticket
        assert torch.equal(ticket.start.loc["layer.weight"], before.loc["layer.weight"] * mask)
        assert torch.equal(ticket.start.scale["head.weight"], before.scale["head.weight"])
        assert not torch.equal(ticket.net["norm.running_mean"], run.level(0).ticket.net["norm.running_mean"])


@pytest.mark.parametrize("rewind", ["epoch:1", "restart:1"])
def test_late_rewinding_goes_back_to_epoch_k_of_level_0(rewind, tmp_path, ten_weights):
    options = SMALL | {"arch": "ten", "levels": 2}
    late = imp.run_imp(Config(**options | {"rewind": rewind, "run_dir": str(tmp_path / "late")}))
    one_epoch = imp.run_imp(Config(**options | {"levels": 0, "epochs": 1, "run_dir": str(tmp_path / "one")}))
    after = one_epoch.level(0).posterior
    for level in (1, 2):
        ticket = late.level(level).ticket
        mask = ticket.mask["layer.weight"]
        assert torch.equal(ticket.start.loc["layer.weight"], after.loc["layer.weight"] * mask)
        assert torch.equal(ticket.start.scale["layer.weight"], after.scale["layer.weight"] * mask)


SCHEDULE = {"arch": "ten", "epochs": 4, "milestones": (3,), "warmup_epochs": 3, "kl_warmup_epochs": 2, "levels": 2}


def test_a_late_rewind_goes_on_at_epoch_k_with_its_rates_and_random_streams(tmp_path, ten_weights):
    """Frankle et al. 2020: levels after the dense one train epochs K to the last, from the schedule's place at K."""
    options = SMALL | SCHEDULE
    late, restarted = (
        imp.run_imp(Config(**options | {"rewind": f"{kind}:1", "run_dir": str(tmp_path / kind)}))
        for kind in ("epoch", "restart")
    )
    rates = late.level(0).history["lr"].tolist()
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-4])
    weights = late.level(0).history["kl_weight"].tolist()
    assert weights == pytest.approx([0.1 / 200 * factor for factor in (0.25, 0.75, 1, 1)])
    for level in (1, 2):
        history = late.level(level).history
        assert history["epoch"].tolist() == [2, 3, 4]
        assert history["lr"].tolist() == rates[1:]
        assert history["kl_weight"].tolist() == weights[1:]
        assert late.results["max_test_accuracy"][level] >= history["test_accuracy"].max()
        assert late.results["train_seconds"][level] == pytest.approx(history["seconds"].sum())
        assert restarted.level(level).history["epoch"].tolist() == [1, 2, 3, 4]
        assert restarted.level(level).history["lr"].tolist() == rates
    data = late.load_data()
    model, guide = build.build(late.config, late.shape)
    schedule = {"milestones": (3,), "warmup_epochs": 3, "kl_warmup_epochs": 2}
    with pl.handlers.sparsify(model.start_from_(guide, late.level(1).ticket)):
        pl.train(model, guide, data, epochs=3, state=pl.TrainState(1), **schedule, level=1)
    assert torch.equal(pl.posterior(guide).loc["head.weight"], late.level(1).posterior.loc["head.weight"])


def test_controls_and_transplants_of_a_late_rewind_train_the_epochs_of_their_level(tmp_path, ten_weights):
    options = SMALL | SCHEDULE | {"levels": 1, "epochs": 3, "rewind": "epoch:2", "guide": "deterministic"}
    run = imp.run_imp(Config(**options | {"run_dir": str(tmp_path / "run")}))
    derived = controls.run_control(run, "shuffle_even"), transplant.transplant_run(run, [0, 1])
    assert [found.level(1).history["epoch"].tolist() for found in derived] == [[3], [3]]
    assert derived[1].level(0).history["epoch"].tolist() == [1, 2, 3]


def test_same_seed_gives_equal_files_and_more_levels_extend(tmp_path):
    once = small_run(tmp_path / "a")
    imp.run_imp(Config(**SMALL | {"levels": 1}, run_dir=str(tmp_path / "b")))
    small_run(tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert len(once.results) == 3


def test_levels_after_one_that_is_trained_again_hold_if_their_tickets_do(tmp_path):
    """On one machine the same bits come out again; where others do, as on another machine, later levels are trained again."""
    path, options = tmp_path / "run", SMALL | {"run_dir": str(tmp_path / "run"), "epochs": 1}
    imp.run_imp(Config(**options))
    before = fingerprint(path)
    truncated = path / "level_00" / "posterior.safetensors"
    for noise, later in (("auto", 0), ("torch", 2)):
        truncated.write_bytes(b"")
        with warnings.catch_warnings(record=True) as caught, kernels.using(noise):
            warnings.simplefilter("always")
            imp.run_imp(Config(**options))
        shutil.rmtree(path / "level_00.damaged")
        said = [str(w.message) for w in caught]
        assert sum("level 0 is trained again" in text for text in said) == 1
        assert sum("was trained from another ticket" in text for text in said) == later
        assert (fingerprint(path) == before) == (noise == "auto")


def command(run_dir, *more):
    return [
        sys.executable, "-m", "pyro_lottery.imp", "--arch", "lenet", "--preset", "quick", "--levels", "1", "--epochs",
        "25", "--train-size", "300", "--run-dir", str(run_dir), *more,
    ]  # fmt: skip


def begun(run_dir, moment):
    """A process that trains, and that has said that it is at ``moment``."""
    process = subprocess.Popen(command(run_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(moment in line for line in process.stdout), process.communicate()[1]
    return process


@pytest.mark.slow
def test_sigterm_and_kill_nine_in_the_middle_end_bit_identical(tmp_path):
    """Two processes are disturbed; what they are compared with and the last resumption run in this one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = begun(broken, "level 0/1, density 100 %: epoch 1/25")
    process.send_signal(signal.SIGTERM)  # wherever in an epoch
    error = process.communicate(timeout=DEADLOCK)[1]
    assert process.returncode == 75, error
    assert f"to resume: python {shlex.join(command(broken)[1:])}" in error
    assert (broken / "level_00" / "checkpoint.safetensors").exists()

    process = begun(broken, "level 1/1, density 50 %: epoch 1/25")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLOCK)
    assert len((broken / "results.csv").read_text().splitlines()) == 2

    assert imp.main(command(broken)[3:]) == 0
    assert imp.main(command(whole)[3:]) == 0
    assert fingerprint(broken) == fingerprint(whole)
    assert not list(broken.rglob("*checkpoint*"))


@pytest.mark.parametrize(
    "more",
    [
        {"estimator": "weights"},
        {"estimator": "local"},
        {"rewind": "epoch:1", "epochs": 3, "milestones": (2,), "kl_warmup_epochs": 2},
    ],
)
def test_a_checkpoint_within_an_epoch_holds_all_that_matters(more, tmp_path, monkeypatch):
    """Stop at the first step of every level's second epoch, by the same path a signal takes, and go on."""
    options = SMALL | more
    whole = imp.run_imp(Config(**options, run_dir=str(tmp_path / "whole")))
    asked = []

    def once_a_level(self):
        asked.append(self.folder.path)  # 2 epochs of 2 batches: the second question comes in a level's second epoch
        return asked.count(self.folder.path) == 2

    monkeypatch.setattr(LevelHooks, "stopping", once_a_level)
    stops = 0
    while True:
        try:
            broken = imp.run_imp(Config(**options, run_dir=str(tmp_path / "broken")))
            break
        except pl.errors.Stopped:
            stops += 1
    assert stops == 3
    assert fingerprint(whole.folder.path) == fingerprint(broken.folder.path)


def test_a_signal_while_a_level_is_measured_stops_at_once_and_loses_no_epoch(tmp_path, monkeypatch):
    """Ten samples of all test images may take minutes."""

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on measuring")

    whole, broken = (Config(**SMALL | {"run_dir": str(tmp_path / name)}) for name in ("whole", "broken"))
    imp.run_imp(whole)
    with monkeypatch.context() as patched:
        patched.setattr("pyro_lottery.levels.predict", interrupted)
        with pytest.raises(Stopped):
            imp.run_imp(broken)
    _, info = untrusted.load_tensors(tmp_path / "broken" / "level_00" / "checkpoint.safetensors")
    assert info["epoch"] == 2
    imp.run_imp(broken)
    assert fingerprint(tmp_path / "broken") == fingerprint(tmp_path / "whole")


def test_the_run_folder_is_as_promised(tmp_path, capsys, refused):
    path = tmp_path / "run"
    arguments = [
        f"--{n.replace('_', '-')}={v}"
        for n, v in (SMALL | {"levels": 1, "val_fraction": 0.1}).items()
        if n != "milestones"
    ]
    assert imp.main([*arguments, "--milestones", "1", "--run-dir", str(path)]) == 0
    out = capsys.readouterr().out
    assert "level 1/1, density 80 %: epoch 2/2" in out
    assert "results, tickets, posteriors and figures" in out
    config = json.loads((path / "config.json").read_text())
    assert {"torch", "pyro-ppl", "pyro-lottery"} <= config["versions"].keys()
    assert config["seed"] == 0
    assert config["hardware"]["device"] == "cpu"
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    level = {"ticket.safetensors", "posterior.safetensors", "history.csv", "level.json"}
    expected = {f"level_0{k}/{n}" for k in (0, 1) for n in level}
    assert names - {".lock"} == expected | {"config.json", "results.csv", "accuracy.png", "layers.png"}
    run = pl.load_run(path)
    best = run.level(1).history.sort_values("val_accuracy", kind="stable", ascending=False).iloc[0]
    assert run.results.loc[1, "val_accuracy"] == pytest.approx(best["val_accuracy"])
    assert run.results.loc[1, "max_test_accuracy"] >= run.level(1).history["test_accuracy"].max() - 1e-6
    tensors, _ = untrusted.load_tensors(path / "level_01" / "ticket.safetensors")
    assert tensors["mask/conv1.weight"].dtype == torch.uint8

    before = fingerprint(path)
    assert imp.main([*arguments, "--milestones", "1", "--run-dir", str(path)]) == 0, "a finished run is not run again"
    arguments += ["--milestones", "1", "--run-dir", str(path), "--lr", "0.1"]
    refused(imp.main, arguments, "lr was 0.001, now it is 0.1")
    assert fingerprint(path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "resnet17"], "unknown --arch 'resnet17': did you mean"),
        (["--dataset", "digit"], "did you mean digits"),
        (["--score", "snrr"], "did you mean snr"),
        (["--prior", "gauss"], "unknown --prior"),
        (["--guide", "no.such.Guide"], "--guide no.such.Guide cannot be imported"),
        (["--prune-fraction", "1.5"], "between 0 and 1"),
        (["--dataset", "folder", "--data-dir", "/no/such/folder"], "no folder train/"),
        (["--device", "cuda:77"], "--device cuda:77 is not available"),
        (["--train-size", "99999"], "the training set has 1437 images"),
        (["--guide", "deterministic", "--score", "squared_sum"], "a point guide has none"),
        (["--guide", "pyro.infer.autoguide.AutoDelta", "--prior", "laplace"], "a point guide has none"),
        (
            ["--arch", "resnet20", "--guide", "pyro.infer.autoguide.AutoMultivariateNormal"],
            "GiB to train, and there are",
        ),
        (["--guide", "builtins.repr"], "gave a str; expected a Pyro AutoGuide"),
        (["--score", "math.pi"], "--score math.pi is a float"),
        (["--score", "..no"], "cannot be imported"),
        (["--arch", "timm:vit_tiny_patch16_224"], "--arch timm:vit_tiny_patch16_224 cannot take images of (1, 8, 8)"),
        (["--arch", "vit_tiny", "--patch-size", "64"], "--arch vit_tiny cannot take images"),
        (["--val-fraction", "0.0001"], "--val-fraction 0.0001 of 1437 training images holds out 0"),
        (["--arch", "resnet20", "--batch-size", "1"], "BatchNorm cannot normalise a batch of one"),
        (["--device", "meta"], "--device meta is not available"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_and_writes_nothing(arguments, message, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = ["--preset", "quick", "--arch", "lenet", "--epochs", "1", "--milestones", "1"]
    refused(imp.main, [*usual, *arguments], message)
    assert os.listdir(tmp_path) == []


class Poisoned(TenWeights):
    """Its outputs turn to NaN in the second epoch of training (two batches an epoch)."""

    steps = 0

    def forward(self, x):
        self.steps += self.training
        return super().forward(x) * (math.nan if self.steps > 3 else 1.0)


def test_a_diverging_run_names_the_step_keeps_its_checkpoint_and_exits_1(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(nets._NETS, "poisoned", lambda classes, channels, size, patch: Poisoned())
    monkeypatch.setattr("pyro_lottery.runs.checkpoint.CHECKPOINT_SECONDS", 0.0)
    arguments = ["--preset", "quick", "--arch", "poisoned", "--train-size", "128", "--run-dir", str(tmp_path / "run")]
    where = "not finite at epoch 2, step 2 (not finite by then: layer.weight, layer.bias, head.weight and"
    refused(imp.main, arguments, where, code=1)
    tensors, info = untrusted.load_tensors(tmp_path / "run" / "level_00" / "checkpoint.safetensors")
    assert info["epoch"] == 1
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


class PoisonedOnce(TenWeights):
    """Its outputs turn to NaN at the first training step of level 1, the first time only."""

    steps, poisoned = 0, False

    def forward(self, x):
        self.steps += self.training
        bad = self.steps == 5 and not PoisonedOnce.poisoned
        PoisonedOnce.poisoned |= bad
        return super().forward(x) * (math.nan if bad else 1.0)


@pytest.mark.filterwarnings("default")
def test_a_diverged_level_is_tried_again_once_with_half_the_learning_rate(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(nets._NETS, "ten", lambda classes, channels, size, patch: TenWeights())
    monkeypatch.setitem(nets._NETS, "once", lambda classes, channels, size, patch: PoisonedOnce())
    monkeypatch.setitem(nets._NETS, "poisoned", lambda classes, channels, size, patch: Poisoned())
    usual = ["--preset", "quick", "--levels", "1", "--epochs", "2", "--train-size", "128", "--on-divergence", "retry"]
    assert imp.main([*usual, "--arch", "once", "--run-dir", str(tmp_path / "once")]) == 0
    assert "level 1 starts again with --lr 0.0005" in capsys.readouterr().err
    run = pl.load_run(tmp_path / "once")
    what = json.loads((tmp_path / "once" / "level_01" / "diverged.json").read_text())
    assert (what["epoch"], what["step"], what["lr"]) == (1, 1, 0.0005)
    assert [run.level(k).history["lr"][0] for k in (0, 1)] == [0.001, 0.0005]
    # the second training is that of the same ticket at that rate: nothing of the first is left in it
    run_imp_at = Config(**run.config.options() | {"arch": "ten", "run_dir": str(tmp_path / "ten"), "levels": 0})
    imp.run_imp(run_imp_at)
    other = RunFolder(tmp_path / "ten")
    other.level(1).path.mkdir()
    other.level(1).save_divergence(what)
    again = imp.run_imp(replace(run_imp_at, levels=1))
    assert torch.equal(again.level(1).posterior.loc["layer.weight"], run.level(1).posterior.loc["layer.weight"])

    assert imp.main([*usual, "--arch", "poisoned", "--run-dir", str(tmp_path / "always")]) == 1, "once, not for ever"
    assert "not finite at epoch" in capsys.readouterr().err
    other.level(1).save_divergence({"lr": "fast"})
    (other.level(1).path / "level.json").unlink()
    refused = pytest.raises(Damaged, match=r"diverged\.json has lr fast, expected half of --lr 0\.001")
    with pytest.warns(UserWarning, match=r"level_01 has the files of a finished level and no level\.json"), refused:
        imp.run_imp(replace(run_imp_at, levels=1))


def test_a_checkpoint_of_another_training_is_named(tmp_path, monkeypatch):
    for arch in ("lenet", "resnet20"):
        monkeypatch.setattr(LevelHooks, "stopping", lambda self: True)
        with pytest.raises(Stopped):
            small_run(tmp_path / arch, arch=arch)
    monkeypatch.undo()
    foreign, checkpoint = (RunFolder(tmp_path / arch).level(0).checkpoint for arch in ("resnet20", "lenet"))
    tensors, info = untrusted.load_tensors(checkpoint)
    moment = next(n for n in tensors if n.endswith("exp_avg"))
    files.save_tensors(checkpoint, *untrusted.load_tensors(foreign))
    monkeypatch.setattr(LevelHooks, "stopping", lambda self: True)
    with (
        pytest.warns(UserWarning, match="belongs to another ticket; the level is trained from its start"),
        pytest.raises(Stopped),
    ):
        small_run(tmp_path / "lenet")
    monkeypatch.undo()
    tensors, info = untrusted.load_tensors(checkpoint)
    assert info["epoch"] == 0
    for made in (
        (untrusted.load_tensors(foreign)[0], info),
        (tensors | {moment: tensors[moment][:-1]}, info),
        (tensors | {"sums": torch.zeros(2)}, info),
        (tensors | {"generator/noise": torch.zeros(3, dtype=torch.uint8)}, info),
        (tensors, info | {"epoch": 1}),
        (tensors, info | {"epoch": 0.0}),
        (tensors, info | {"step": 1000}),
        (tensors | {moment: tensors[moment].long()}, info),
        ({n: t for n, t in tensors.items() if n != moment}, info),
        ({n: t for n, t in tensors.items() if not n.startswith("generator")}, info),
        (tensors, info | {"step": "x"}),
        (tensors, info | {"history": [[]]}),
        (tensors, info | {"epoch": 1, "history": [{"epoch": 1.0}]}),
        ({n: t for n, t in tensors.items() if not n.startswith("optimizer")}, info),
        (tensors, {}),
    ):
        files.save_tensors(checkpoint, *made)
        with pytest.raises(Damaged, match="belongs to another training"):
            small_run(tmp_path / "lenet")
    files.save_tensors(checkpoint, tensors, info)
    small_run(tmp_path / "lenet")


def test_presets_reach_the_run(tmp_path):
    config = preset("quick", arch="lenet", levels=0, epochs=1, milestones=(), run_dir=str(tmp_path / "r"))
    assert imp.run_imp(config).config.dataset == "digits"


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns where bf16 is emulated
def test_precision_auto_is_the_faster_one_and_a_run_keeps_what_it_was_begun_in(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_lottery.machine.has_bf16", lambda device: True)
    measured = []
    options = SMALL | {"levels": 0, "epochs": 1, "arch": "lenet", "precision": "auto"}
    for faster, precision in ((False, "32"), (True, "bf16")):
        fake = lambda *ways, faster=faster: measured.append(faster) or faster  # noqa: E731
        monkeypatch.setattr("pyro_lottery.training.precision.is_faster", fake)
        run = imp.run_imp(Config(**options, run_dir=str(tmp_path / precision)))
        assert run.config.precision == precision
    assert measured == [False, True]
    for precision in ("32", "bf16"):  # the measurement now says bf16, and the run's own precision counts
        resumed = imp.run_imp(Config(**options | {"levels": 1}, run_dir=str(tmp_path / precision)))
        assert resumed.config.precision == precision
        assert list(resumed.results.level) == [0, 1]
        other = {"32": "bf16", "bf16": "32"}[precision]
        with pytest.raises(pl.UserError, match=f"precision was {precision}, now it is {other}"):
            imp.run_imp(Config(**options | {"precision": other}, run_dir=str(tmp_path / precision)))
    assert len(measured) == 2


class OneLayer(nn.Module):
    """One linear layer for [n, 1, 8, 8] images: the classifier, which is not pruned."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_a_level_that_nothing_would_be_left_of_is_refused_before_anything_is_trained(
    tmp_path, ten_weights, monkeypatch
):
    # 10 weights: 2, 2, 2, 1, 1 and 1 go and leave 1, whose pruning would leave none.
    run_dir = tmp_path / "run"
    with pytest.raises(
        pl.UserError, match=r"--levels 200 would prune every weight: .* 10 prunable .* at most --levels 6"
    ):
        small_run(run_dir, arch="ten", levels=200)
    monkeypatch.setitem(nets._NETS, "one", lambda *args: OneLayer())
    with pytest.raises(pl.UserError, match="nothing can be pruned"):
        small_run(run_dir, arch="one")
    assert not run_dir.exists()
    dense = small_run(run_dir, arch="one", levels=0, epochs=1)
    assert dense.results[["density", "remaining", "total"]].values.tolist() == [[1, 0, 0]]
    assert dense.level(0).load_model().predict(dense.load_data().test, 2).shape[1] == 10
