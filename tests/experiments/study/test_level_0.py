"""Runs of a study that train the same level 0 train it once, and have the bits of runs that trained their own."""

import shutil
import threading
import warnings
from dataclasses import replace

import pytest

from experiments.command import FIGURES, jobs_of, parser, print_plan, study_of
from experiments.study.executors import here, ray, slurm
from experiments.study.jobs import Control, Imp, from_json, ready, released, share_level_0, to_json, untrained
from experiments.study.level_0 import source_of
from experiments.study.walltime import Work, critical_path, makespan, trainings
from pyro_lottery.errors import Diverged
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.config import preset
from pyro_lottery.tables import list_runs
from tests.experiments.study.support import given, same_as
from tests.experiments.study.test_jobs import FakeRay
from tests.runs.made import truncate


def run(**options):
    return Imp(preset("smoke", arch="lenet", **options))


SNR, MAGNITUDE, LRR, POINT = run(), run(score="magnitude"), run(rewind="lr"), run(guide="deterministic")
CONTROL = Control(MAGNITUDE, "reinit", (2,))


def train_level_0(job, root):
    run_imp(replace(job.config, levels=0, run_dir=str(job.folder(root).path)))


def sources(root):
    """Which runs copied level 0, and from which run."""
    runs = list_runs(root)
    names = {str(found.folder.path): found.config.score + found.config.rewind for found in runs}
    return {names[str(found.folder.path)]: names.get(found.config.level0_from or "") for found in runs}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with runs that trained level 0 each for itself, and a control."""
    root = tmp_path_factory.mktemp("alone")
    for job in (SNR, MAGNITUDE, LRR):
        run_imp(replace(job.config, run_dir=str(job.folder(root).path)))
    CONTROL.run(root)
    return root


def test_the_first_run_trains_level_0_for_those_that_differ_in_what_comes_after(tmp_path):
    jobs = [SNR, POINT, CONTROL, MAGNITUDE, run(lr=0.1), LRR, run(seed=1), run(rewind="restart:1"), MAGNITUDE]
    shared = share_level_0(jobs)
    assert shared == jobs[:-1], "jobs are equal whatever they share"
    assert [getattr(job, "shares", None) for job in shared] == [None, None, None, SNR, None, SNR, None, None]
    assert from_json(to_json(shared[3])).shares is None, "an array job of SLURM waits for none"


def test_a_run_waits_for_the_level_0_that_another_trains_unless_that_one_failed(tmp_path):
    waiting = share_level_0([SNR, MAGNITUDE])[1]
    assert ready(waiting, tmp_path) is None
    assert released(waiting, [POINT]).shares == SNR
    assert ready(released(waiting, [SNR]), tmp_path) == MAGNITUDE
    assert untrained(waiting, tmp_path) == [1, 2]
    assert untrained(MAGNITUDE, tmp_path) == [0, 1, 2]
    train_level_0(SNR, tmp_path)
    assert ready(waiting, tmp_path) == MAGNITUDE, "while the first trains its next levels"
    assert untrained(MAGNITUDE, tmp_path) == [1, 2], "a run that is not of this study has trained it"
    assert source_of(replace(MAGNITUDE.config, precision="auto"), tmp_path).path == SNR.folder(tmp_path).path
    assert source_of(run(seed=1).config, tmp_path) is None
    truncate(SNR.folder(tmp_path).level(0).path / "level.json")
    assert source_of(MAGNITUDE.config, tmp_path) is None


def test_a_study_has_the_bits_of_runs_alone_and_trains_level_0_once(alone, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "trains level 0 itself")
        assert here.carry_out(share_level_0([SNR, MAGNITUDE, LRR, CONTROL]), tmp_path) == {}
    assert capsys.readouterr().out.count("level 0/") == 1
    assert same_as(alone, tmp_path) == same_as(tmp_path, alone) == 4
    assert sources(tmp_path) == {"snrinit": None, "magnitudeinit": "snrinit", "snrlr": "magnitudeinit"}


def test_a_task_begins_when_level_0_is_there(alone, tmp_path):
    fake = FakeRay(tmp_path)  # trains the first run to level 1 while it is looked at
    assert ray._carry_out(fake, fake.start, share_level_0([SNR, MAGNITUDE]), tmp_path) == {}
    assert fake.started == [SNR, MAGNITUDE]
    assert sources(tmp_path) == {"snrinit": None, "magnitudeinit": "snrinit"}
    assert same_as(alone, tmp_path) == 2


def test_a_run_that_another_process_trains_is_waited_for_up_to_level_0(alone, tmp_path, monkeypatch):
    started, trained, copied = threading.Event(), threading.Event(), threading.Event()
    order, real, folder = [], Imp.run, SNR.folder(tmp_path)

    def other_process():
        with folder.lock():
            started.set()
            trained.wait()
            copied.wait()

    def train_level_0_there(seconds):
        if not trained.is_set():  # it waits again if the lock is given back late
            shutil.copytree(SNR.folder(alone).path / "level_00", folder.path / "level_00")
            shutil.copy(SNR.folder(alone).path / "config.json", folder.path)
            trained.set()

    def run(job, root):
        real(job, root)
        order.append(job)
        copied.set()

    monkeypatch.setattr(here, "sleep", train_level_0_there)  # its own alone: the lock sleeps too
    monkeypatch.setattr(Imp, "run", run)
    thread = threading.Thread(target=other_process, daemon=True)
    thread.start()
    started.wait()
    assert here.carry_out(share_level_0([SNR, MAGNITUDE]), tmp_path) == {}
    thread.join()
    assert order == [MAGNITUDE, SNR]
    assert same_as(alone, tmp_path) == 2


def test_a_run_whose_source_failed_trains_level_0_itself(alone, tmp_path, monkeypatch):
    real = Imp.run

    def diverge(job, root):
        if job == SNR:
            raise Diverged("the loss is not finite", 1, 1, [])
        real(job, root)

    monkeypatch.setattr(Imp, "run", diverge)
    assert set(here.carry_out(share_level_0([SNR, MAGNITUDE, LRR]), tmp_path)) == {SNR}
    assert same_as(alone, tmp_path) == 2
    assert sources(tmp_path) == {"magnitudeinit": None, "snrlr": "magnitudeinit"}


def test_an_array_of_slurm_trains_level_0_before_the_runs(alone, tmp_path):
    shared = share_level_0([SNR, MAGNITUDE, LRR, CONTROL])
    waves = slurm.waves(shared, tmp_path)
    level_0 = run(levels=0)
    assert waves == [[level_0], [SNR, MAGNITUDE, LRR], [CONTROL]]
    assert str(level_0) == "lenet, mean_field, snr, level 0, seed 0"
    for after, array in (("FIRST", 2), ("SECOND", 3)):
        script = slurm.dry_run(shared, tmp_path, given()).split("#!/bin/bash")[array]
        assert f"--dependency=afterany:JOB_ID_OF_THE_{after}_ARRAY\n" in script
    for job in (from_json(to_json(job)) for wave in waves for job in wave):
        assert slurm.run_job(job, tmp_path) == 0
    assert same_as(alone, tmp_path) == 4
    assert sources(tmp_path)["magnitudeinit"] == "snrinit"
    assert slurm.waves(shared, tmp_path) == []
    assert slurm.waves([shared[1]], alone) == [], "what is finished is not trained again"


def test_a_level_0_that_cannot_be_copied_is_trained(alone, tmp_path):
    train_level_0(SNR, tmp_path)
    truncate(SNR.folder(tmp_path).level(0).path / "posterior.safetensors")
    with pytest.warns(UserWarning, match=r"magnitude.* trains level 0 itself: .*posterior\.safetensors does not have"):
        MAGNITUDE.run(tmp_path)
    assert sources(tmp_path)["magnitudeinit"] is None


def test_wall_time_by_hand():
    first, second, third = share_level_0([SNR, MAGNITUDE, POINT])
    work = {
        first: Work(1, {0: 4, 1: 2, 2: 2}),
        second: Work(1, {1: 3, 2: 3}),
        CONTROL: Work(1, {2: 5}),
        third: Work(1, {0: 1}),
    }
    assert makespan(work, 1) == 9 + 7 + 6 + 2
    # one worker: SNR to 9; the other: POINT to 2, then from 5 on MAGNITUDE to 12; CONTROL from 12 to 18
    assert makespan(work, 2) == 18
    assert critical_path(work) == 18
    assert trainings(work) == 1 + 2 + 1
    del work[first]
    assert critical_path(work) == 7 + 6, "level 0 is there"


@pytest.mark.parametrize(("protocol", "alone", "once", "longest"), [("paper", 126, 90, 22), ("smoke", 11, 7, 4)])
def test_how_often_a_protocol_trains_level_0(protocol, alone, once, longest):
    jobs = share_level_0(jobs_of(FIGURES, study_of(parser("all", "").parse_args(["--protocol", protocol]))))
    runs = [job for job in jobs if isinstance(job, Imp)]
    assert (len(runs), sum(job.shares is None for job in runs)) == (alone, once)
    trained = {job: [n for n in job.levels if n or not getattr(job, "shares", None)] for job in jobs}
    assert trainings({job: Work(0.0, dict.fromkeys(levels, 1.0)) for job, levels in trained.items()}) == longest


def test_a_dry_run_counts_level_0_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.command.seconds_left", lambda job, levels, root: 1000.0 * len(levels))
    print_plan(share_level_0([SNR, MAGNITUDE]), tmp_path)
    out = capsys.readouterr().out
    assert "lenet, mean_field, magnitude, seed 0: 0 of 3 levels, 33 min left" in out
    assert "together: 83 min left" in out
