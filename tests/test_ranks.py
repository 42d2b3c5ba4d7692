"""Two real ranks on one processor, started as users start them."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import pyro_lottery as pl
from experiments.soak import fingerprint
from pyro_lottery import imp
from pyro_lottery.ranks import ALONE, is_first

from .test_imp import wait_for


@pytest.fixture(scope="module", params=["data", "samples"])
def found(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "found.json"
    subprocess.run([sys.executable, "-m", "tests.two_ranks", str(path), request.param], check=True, timeout=120)
    return json.loads(path.read_text()) | {"parallel": request.param}


def test_each_image_is_on_one_rank_or_on_all(found):
    assert found["world"] == 2
    assert found["images"] == ([4, 3] if found["parallel"] == "data" else [7, 7])


def test_without_noise_two_ranks_have_the_gradient_of_one_with_the_joined_batch(found):
    assert found["gradient"] < 1e-5
    assert found["sums"] < 1e-5


def test_two_ranks_have_the_elbo_of_one_with_the_joined_batch_in_expectation(found):
    difference, error = found["elbo"]
    assert abs(difference) < 3 * error
    assert error < 0.1, "of a loss of about two nats"
    assert found["kl"] < 1e-5


def test_each_rank_has_weight_noise_of_its_own(found):
    first, second = found["noise"]
    assert first != second
    # The mean of two draws has half the variance; where each sees other images, the variance that images add is not halved.
    least, most = (0.4, 0.6) if found["parallel"] == "samples" else (0.4, 1.0)
    assert least < found["spread"] < most


def test_what_the_first_rank_meets_all_meet(found):
    assert found["first"][1] == "only the first knows"
    assert found["first"][0] == [len("only the first knows")] * 2
    assert found["agree"][1].startswith("it differs between ranks (checksums [0, 1])")
    assert found["any"] == [True, False]


def command(folder, *more):
    return [
        sys.executable, "-m", "pyro_lottery.imp", "--arch", "lenet", "--preset", "quick", "--levels", "3", "--epochs", "4",
        "--devices", "2", "--device", "cpu", "--run-dir", str(folder), *more,
    ]  # fmt: skip


def test_three_levels_on_two_ranks_and_again_after_a_stop(tmp_path):
    """Masks, parameters and buffers are compared between ranks at every level by the run itself (``Alone.agree``)."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(command(whole), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("results, tickets") == 1, "one rank speaks"
    run = pl.load_run(whole)
    assert run.results["remaining"].tolist() == [20310, 10155, 5077, 2538]
    assert run.results["test_accuracy"][1] > 0.6

    process = subprocess.Popen(command(broken), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for((broken / "level_01" / "ticket.safetensors").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert process.communicate()[1].count("to go on: ") == 1
    assert len(pl.load_run(broken).results) < 4
    assert subprocess.run(command(broken), capture_output=True, timeout=300).returncode == 0
    assert fingerprint(broken) == fingerprint(whole)


def test_bad_input_is_said_once(tmp_path):
    done = subprocess.run(command(tmp_path / "run", "--batch-size", "3"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("--batch-size and --train-size must be at least 4, two images a device") == 1
    assert len(done.stderr.splitlines()) == 1


def test_nothing_of_it_is_imported_with_one_device(tmp_path):
    code = (
        "import sys; from pyro_lottery import imp; code = imp.main(sys.argv[1:]); "
        "sys.exit(code or 'lightning_fabric' in sys.modules or 'torch.distributed.run' in sys.modules)"
    )
    arguments = [
        *command(tmp_path / "run")[3:],
        "--devices",
        "1",
        "--levels",
        "0",
        "--epochs",
        "1",
        "--milestones",
        "1",
    ]
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sync-batchnorm"], "--sync-batchnorm is for several GPUs"),
        (["--devices", "0"], "--devices must be at least 1"),
        (["--strategy", "fsdp"], "unknown --strategy 'fsdp'"),
        (["--parallel", "sample"], "did you mean samples"),
    ],
)
def test_options_of_devices_are_checked(options, message, tmp_path, capsys):
    usual = ["--preset", "quick", "--arch", "lenet", "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    assert imp.main([*usual, *options]) == 2
    assert message in capsys.readouterr().err


def test_one_process_is_the_first_and_shares_nothing(monkeypatch):
    batch = torch.arange(5)
    assert ALONE.share(batch) is batch
    assert ALONE.any(True)
    assert ALONE.path == ()
    assert is_first()
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    assert not is_first()
