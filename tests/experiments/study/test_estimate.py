import pytest

from experiments.study import estimate
from experiments.study.jobs import Imp, Transplant
from pyro_lottery.runs.config import preset
from pyro_lottery.tables import levels, list_runs


def test_time_left_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda config: (0.5, 0.01))  # seconds per step, and per predicted image
    options = {"arch": "lenet", "train_size": 100, "batch_size": 25, "test_size": 40, "epochs": 3, "milestones": ()}
    job = Imp(preset("smoke", **options, eval_samples=10))
    # 3 epochs of 4 steps and of 40 images from one sample, and at the end 40 images from ten
    assert estimate.seconds_left(job, [0, 1], tmp_path) == pytest.approx(
        2 * (3 * (4 * 0.5 + 40 * 0.01) + 10 * 40 * 0.01)
    )
    point = Imp(preset("smoke", **options, eval_samples=10, guide="deterministic"))
    assert estimate.seconds_left(point, [0], tmp_path) == pytest.approx(3 * (4 * 0.5 + 40 * 0.01) + 40 * 0.01)
    late = Imp(preset("smoke", **options, eval_samples=1, rewind="epoch:1"))  # level 1 trains the last 2 epochs
    left = (3 + 2) * (4 * 0.5 + 40 * 0.01) + 2 * 40 * 0.01
    assert estimate.seconds_left(late, [0, 1], tmp_path) == pytest.approx(left)
    paper = Imp(preset("paper"))  # its images are counted without a download
    step = 160 * (391 * 0.5 + 10 * 10_000 * 0.01) + 10 * 10_000 * 0.01
    assert estimate.seconds_left(paper, [0], tmp_path) == pytest.approx(step)


def test_the_step_of_a_finished_run_is_what_a_like_one_takes(smoke_study, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda config: (1e9, 0.0))
    job = Imp(preset("smoke", arch="lenet", seed=7))
    frame = levels(list_runs(smoke_study))
    steps = set(frame[(frame["arch"] == "lenet") & (frame["guide"] == "mean_field")]["step_ms"] / 1000)
    assert estimate.seconds_left(job, [0], smoke_study) / 2 in steps, "2 steps of one epoch"
    transplant = Transplant(Imp(preset("smoke", arch="lenet", seed=7, guide="deterministic")), (2,))
    assert estimate.seconds_left(transplant, [2], smoke_study) < 1e6, "a transplant trains as a Bayesian run does"


def test_images_are_as_large_as_asked_for_without_a_download():
    assert estimate.sizes("svhn", "data", 64) == (73_257, 26_032, 3, (64, 64), 10)
    assert estimate.sizes("digits", "data", 9) == (1437, 360, 1, (9, 9), 10)


def test_a_step_is_measured_on_random_images():
    step, forward = estimate.measure(preset("smoke", arch="lenet"))
    assert step > 0
    assert forward > 0
