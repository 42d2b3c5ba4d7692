"""SLURM's array jobs, with a small SLURM that runs the submitted scripts on this machine."""

import json
import signal
import subprocess

import pytest

from experiments.command import main, parser
from experiments.study.executors import here, slurm
from experiments.study.executors.slurm import dry_run, submit, waves
from experiments.study.executors.worker import log_of
from experiments.study.jobs import Imp, Transplant, from_json
from pyro_lottery.errors import Stopped, UserError
from pyro_lottery.runs.config import preset
from tests.experiments.study.slurm import Slurm
from tests.experiments.study.support import given, same_as
from tests.support import wait_for


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return Slurm(tmp_path / "cluster").install(monkeypatch)


@pytest.mark.slow
def test_arrays_train_the_same_bits_and_a_job_that_is_signalled_is_requeued(tmp_path, cluster):
    options = {"arch": "lenet", "train_size": 300, "milestones": (), "levels": 1, "guide": "deterministic"}
    long = Imp(preset("quick", **options, epochs=30))
    jobs, root = [long, Imp(preset("quick", **options, epochs=1)), Transplant(long, (1,))], tmp_path / "slurm"
    assert submit(jobs, root, given("--time-limit", "60")) == ["1_0", "1_1", "2_0"]
    assert "--dependency=afterany:1\n" in cluster.script(2)
    assert "--dependency" not in cluster.script(1)
    ticket = long.folder(root).path / "level_00" / "ticket.safetensors"
    assert cluster.run(1, interrupt=lambda process: wait_for(ticket.exists, process)) == {0: [75, 0], 1: [0]}
    assert cluster.requeued() == ["1_0"]
    assert cluster.call(2, 0) == 0
    assert here.carry_out(jobs, tmp_path / "here") == {}
    assert same_as(tmp_path / "here", root) == 3
    log = log_of(long, root).read_text()
    assert log.count("begin ") == 2
    assert log.count("stopped, everything is saved") == 1
    assert submit(jobs, root, given()) == [], "finished jobs are not submitted again"


def test_a_job_that_fails_ends_with_1_and_so_does_what_is_made_from_it(jobs, tmp_path, cluster, capsys):
    folder = jobs[1].folder(tmp_path).path
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("")
    assert submit(jobs, tmp_path, given()) == ["1_0", "1_1", "2_0"]
    assert cluster.call(1, 1) == 1
    assert f"see {log_of(jobs[1], tmp_path)}" in capsys.readouterr().err
    assert cluster.call(2, 0) == 1
    assert "the run that it is made from failed" in capsys.readouterr().err
    assert not cluster.requeued()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_only_the_warning_before_the_time_limit_requeues(number, jobs, tmp_path, cluster, monkeypatch):
    def stop(job, root, failure):
        with pytest.raises(Stopped):
            signal.raise_signal(number)
        raise Stopped

    monkeypatch.setattr(slurm, "train", stop)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm.run_job(jobs[0], tmp_path) == 75
    assert cluster.requeued() == (["7_3"] if number == signal.SIGUSR1 else [])


def test_what_would_be_submitted_can_be_read(jobs, tmp_path):
    text = dry_run(jobs, tmp_path, given("--max-parallel", "1", "--time-limit", "90", "--partition", "gpu"))
    for line in ("--array=0-1%1", "--array=0-0%1", "--time=90", "--signal=USR1@120", "--partition=gpu", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert text.count("--dependency=afterany:JOB_ID_OF_THE_FIRST_ARRAY\n") == 1
    assert f"# 1: {jobs[1]}" in text
    assert "gpus" not in text
    assert "--gpus-per-node=1" in dry_run(jobs, tmp_path, parser("fig5", "").parse_args([]))
    assert not list(tmp_path.iterdir())
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_what_is_submitted_is_what_a_dry_run_prints(jobs, tmp_path, cluster):
    printed = dry_run(jobs, tmp_path, given())
    submit(jobs, tmp_path, given())
    assert (
        f"{cluster.script(1)}\n{cluster.script(2)}".replace("afterany:1", "afterany:JOB_ID_OF_THE_FIRST_ARRAY")
        == printed
    )
    for wave in waves(jobs, tmp_path):
        listed = json.loads(slurm.jobs_file(wave, tmp_path).read_text())
        assert [from_json(values) for values in listed["jobs"]] == wave


def test_the_command_submits(tmp_path, cluster, capsys):
    options = ["--protocol", "smoke", "--runs", str(tmp_path / "runs"), "--executor", "slurm"]
    assert main("fig5", options) == 0
    assert "3 runs submitted, 1_0; when they are" in capsys.readouterr().out


def test_what_sbatch_refuses_is_one_line(jobs, tmp_path, cluster):
    (cluster.programs / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"sbatch refused the job \(sbatch: error: invalid partition\)"):
        submit(jobs, tmp_path, given())


def test_jobs_that_need_others_come_in_a_second_wave(jobs, smoke_study, tmp_path):
    assert waves(jobs, tmp_path) == [jobs[:2], jobs[2:]]
    assert waves(jobs, smoke_study) == []
