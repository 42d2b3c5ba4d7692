"""Two real ranks on one processor, started as users start them."""

import json
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import imp, seeds, untrusted
from pyro_lottery.distributed import ALONE, is_first
from pyro_lottery.runs.build import Shape, facts
from pyro_lottery.runs.config import Config
from tests.support import DEADLOCK, ROOT, fingerprint, wait_for


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two ranks found out with each kind of ``--parallel``, and the threads that they left."""
    path = tmp_path_factory.mktemp("ranks") / "found.json"
    subprocess.run([sys.executable, "-m", "tests.two_ranks", str(path)], check=True, timeout=DEADLOCK)
    return json.loads(path.read_text()), path.with_suffix(".threads").read_text().split("\n")


@pytest.fixture(params=["data", "samples"])
def found(request, both):
    return both[0][request.param] | {"parallel": request.param}


@pytest.mark.slow
def test_each_image_is_on_one_rank_or_on_all(found):
    assert found["world"] == 2
    assert found["images"] == ([4, 3] if found["parallel"] == "data" else [7, 7])


@pytest.mark.slow
def test_without_noise_two_ranks_have_the_gradient_of_one_with_the_joined_batch(found):
    assert found["gradient"] < 1e-5
    assert found["sums"] < 1e-5


@pytest.mark.slow
def test_two_ranks_have_the_elbo_of_one_with_the_joined_batch_in_expectation(found):
    difference, error = found["elbo"]
    assert abs(difference) < 3 * error
    assert error < 0.1, "of a loss of about two nats"
    assert found["kl"] < 1e-5


@pytest.mark.slow
def test_each_rank_has_weight_noise_of_its_own(found):
    first, second = found["noise"]
    assert first != second
    # The mean of two draws has half the variance; where each sees other images, the variance that images add is not halved.
    least, most = (0.4, 0.6) if found["parallel"] == "samples" else (0.4, 1.0)
    assert least < found["spread"] < most


@pytest.mark.slow
def test_ranks_of_weight_samples_augment_the_same_images_each_for_itself(found):
    assert found["same images"] == [True, True]
    if found["parallel"] == "data":
        assert found["same augmentation"] == [True, True], "every rank draws that of one process, and takes its part"
    else:
        assert found["same augmentation"] == [True, False]
        # an image has 3 * 3 crops, each flipped or not, of which 1 in 18 is the same by chance
        assert 0.7 < found["differently augmented"][1] <= 1


@pytest.mark.slow
def test_ranks_that_are_stopped_within_an_epoch_go_on_with_the_same_augmentation(found):
    assert found["resumed"] == [True, True]


@pytest.mark.slow
def test_what_the_first_rank_meets_all_meet(found):
    assert found["first"][1] == "only the first knows"
    assert found["first"][0] == [len("only the first knows")] * 2
    assert found["every"] == [[len("only the second knows (on rank 1)")] * 2, "only the second knows (on rank 1)"]
    assert found["agree"][1].startswith("it differs between ranks (checksums [0, 1])")
    assert found["any"] == [True, False]


@pytest.mark.slow
def test_no_thread_of_the_group_is_left_when_the_interpreter_ends(both):
    """Or one that waits for Python's lock then, to free a tensor, would abort the process."""
    assert len(both[1]) >= 1
    assert [name for name in both[1] if "gloo" in name] == []


def command(folder, *more):
    """The command of pyro_lottery/README.md on two devices, with fewer epochs."""
    text = (ROOT / "pyro_lottery" / "README.md").read_text()
    written = re.search(r"^python (-m pyro_lottery\.imp [^#\n]*--devices 2)\b", text, re.M).group(1)
    fewer = ["--levels", "3", "--epochs", "4", "--device", "cpu", "--run-dir", str(folder)]
    return [sys.executable, *shlex.split(written), *fewer, *more]


BATCHNORM = [
    "--arch", "resnet20", "--levels", "0", "--epochs", "1", "--milestones", "1", "--train-size", "120", "--batch-size", "4",
    "--test-size", "50", "--eval-samples", "1",
]  # fmt: skip
"""Options of a run on a network with BatchNorm, whose statistics are of each rank's images."""


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory):
    """The folder and the process of a small run whose ranks torchrun has started."""
    folder = tmp_path_factory.mktemp("torchrun") / "whole"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *command(folder, *BATCHNORM)[1:]], capture_output=True, text=True, timeout=DEADLOCK
    )
    return folder, done


@pytest.mark.slow
def test_three_levels_on_two_ranks(tmp_path):
    """Masks, parameters and buffers are compared between ranks at every level by the run itself (``Ranks.agree``)."""
    whole = tmp_path / "whole"
    done = subprocess.run(command(whole), capture_output=True, text=True, timeout=DEADLOCK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("results, tickets") == 1, "one rank speaks"
    run = pl.load_run(whole)
    assert run.results["remaining"].tolist() == [20310, 10155, 5077, 2538]
    assert run.results["test_accuracy"][1] > 0.6


@pytest.mark.slow
def test_two_ranks_stopped_within_an_epoch_end_with_the_same_bits(by_torchrun, tmp_path):
    """Other ranks than those that trained the whole run, which torchrun started."""
    (whole, _), broken = by_torchrun, tmp_path / "broken"
    process = subprocess.Popen(
        command(broken, *BATCHNORM), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for((broken / "level_00" / "ticket.safetensors").exists, process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=DEADLOCK)[1]
    assert process.returncode == 75, error
    assert error.count("to resume: ") == 1
    _, info = untrusted.load_tensors(broken / "level_00" / "checkpoint.safetensors")
    assert info["step"] in range(10, 30, 10)
    again = subprocess.run(command(broken, *BATCHNORM), capture_output=True, text=True, timeout=DEADLOCK)
    assert again.returncode == 0, again.stderr
    assert fingerprint(broken) == fingerprint(whole)


def test_ranks_that_would_train_each_by_itself_are_told(tmp_path, refused, monkeypatch):
    """Started by torchrun without --devices."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    arguments = [*command(tmp_path / "run")[3:], "--devices", "1"]
    refused(imp.main, arguments, "2 processes were started together; give --devices")


def test_what_a_shell_was_given_by_ranks_mutes_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert imp.main(["--arch", "resnet19"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_starts_the_ranks_too(by_torchrun):
    folder, done = by_torchrun
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results, tickets") == 1
    assert len(pl.load_run(folder).results) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sync-batchnorm"], "--sync-batchnorm needs several GPUs"),
        (["--sync-batchnorm", "--devices", "2"], "--sync-batchnorm needs several GPUs"),  # before ranks start
        (["--devices", "0"], "--devices must be at least 1"),
        (["--strategy", "fsdp"], "unknown --strategy 'fsdp'"),
        (["--parallel", "sample"], "did you mean samples"),
    ],
)
def test_options_of_devices_are_checked(options, message, tmp_path, capsys):
    usual = ["--preset", "quick", "--arch", "lenet", "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    assert imp.main([*usual, *options]) == 2
    assert message in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


def test_one_process_is_the_first_and_shares_nothing():
    batch = torch.arange(5)
    assert ALONE.share(batch) is batch
    assert ALONE.any(True)
    assert ALONE.path == ()
    assert ALONE.every(lambda: 7) == 7
    assert is_first()


def test_a_run_whose_ranks_augment_each_for_itself_says_so():
    """So a run that an earlier version began is resumed with a warning."""
    shape = Shape(10, 1, (8, 8), 200, 0)
    for options, expected in (
        ({"devices": 2, "parallel": "samples"}, f"{seeds.STREAMS}, augmentation by rank"),
        ({"devices": 2}, seeds.STREAMS),
        ({"parallel": "samples"}, seeds.STREAMS),
    ):
        assert facts(Config(**options), shape, torch.device("cpu"))["streams"] == expected
