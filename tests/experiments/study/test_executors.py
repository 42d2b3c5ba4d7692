import os
import re
import signal
import subprocess
import sys

import pytest

import pyro_lottery as pl
from experiments.command import FIGURES, jobs_of, main, parser, study_of
from experiments.study import executors
from experiments.study.executors import Task, log_of, sbatch, train, waves, with_slurm
from experiments.study.jobs import Imp, Transplant
from pyro_lottery.errors import Stopped
from pyro_lottery.runs.config import preset
from tests.support import DEADLOCK, ROOT, fingerprint, wait_for


def given(*arguments):
    return parser("fig5", "").parse_args(["--protocol", "smoke", "--gpus-per-run", "0", *arguments])


@pytest.fixture
def jobs():
    """Two runs and the transplant of one of them."""
    return jobs_of(["fig5"], study_of(given()))


def same_as(smoke_study, root):
    """Whether every run in ``root`` is, bit for bit, the one that the executor in this process made."""
    found = [path.parent for path in root.rglob("results.csv")]
    for path in found:
        tensors, tables = fingerprint(path)
        whole = fingerprint(smoke_study / path.relative_to(root))
        # a run's folder holds those of its controls, which other figures need
        assert tensors.items() <= whole[0].items()
        assert tables.items() <= whole[1].items()
    return len(found)


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_ray_runs_all_figures_though_a_worker_is_killed_and_trains_nothing_twice(jobs, smoke_study, tmp_path):
    command = [
        sys.executable, "-m", "experiments.all", "--protocol", "smoke", "--executor", "ray", "--cpus-per-run", "1",
        "--runs", str(tmp_path),
    ]  # fmt: skip
    every, killed = jobs_of(FIGURES, study_of(given())), jobs[1]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ticket = killed.folder(tmp_path).path / "level_01" / "ticket.safetensors"
    wait_for(ticket.exists, process)
    os.kill(int(re.search(r"pid (\d+)", log_of(killed, tmp_path).read_text()).group(1)), signal.SIGKILL)
    out, error = process.communicate(timeout=DEADLOCK)
    assert process.returncode == 0, error
    assert out.count("finished (") == len(every) == 20
    assert same_as(smoke_study, tmp_path) == 20
    for job in every:
        text = log_of(job, tmp_path).read_text()
        assert text.count("begin ") == 1 + (job == killed)
        again = text.count("epoch 1/1") - len(job.levels)
        assert again in ((0, 1) if job == killed else (0,)), "the level at which it was killed, once more"


def test_a_failed_run_is_told_with_its_log_and_stops_no_other(jobs, tmp_path):
    folder = jobs[1].folder(tmp_path).path
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("")
    failure = train(jobs[1], tmp_path)
    assert failure.endswith(f"see {log_of(jobs[1], tmp_path)}")
    assert "not empty and holds no run" in failure
    assert "Traceback" in log_of(jobs[1], tmp_path).read_text()
    assert train(jobs[2], tmp_path, failure) == "what it is made from failed"
    assert train(jobs[0], tmp_path) is None
    before = log_of(jobs[0], tmp_path).read_text()
    assert train(jobs[0], tmp_path) is None
    assert log_of(jobs[0], tmp_path).read_text() == before, "a finished run is not begun again"


@pytest.mark.slow
def test_submitit_runs_the_array_and_requeues_what_is_signalled(tmp_path, monkeypatch):
    options = {"arch": "lenet", "train_size": 300, "milestones": (), "levels": 1, "guide": "deterministic"}
    long = Imp(preset("quick", **options, epochs=60))
    jobs = [long, Imp(preset("quick", **options, epochs=1)), Transplant(long, (1,))]
    interrupted = []
    submitit = executors._import("submitit")
    submit = submitit.AutoExecutor.submit_array

    def submit_and_interrupt(self, tasks):
        submitted = submit(self, tasks)
        if not interrupted:
            wait_for((long.folder(tmp_path / "slurm").path / "level_00" / "ticket.safetensors").exists)
            pid = int(re.search(r"pid (\d+)", log_of(long, tmp_path / "slurm").read_text()).group(1))
            os.kill(pid, signal.SIGUSR1)  # as SLURM does before the time limit
            interrupted.append(pid)
        return submitted

    monkeypatch.setattr(submitit.AutoExecutor, "submit_array", submit_and_interrupt)
    submitted = with_slurm(jobs, tmp_path / "slurm", given("--time-limit", "60"), cluster="local")
    assert [job.result() for job in submitted] == [None] * 3
    assert executors.carry_out(jobs, tmp_path / "here") == {}
    assert same_as(tmp_path / "here", tmp_path / "slurm") == 3
    log = log_of(long, tmp_path / "slurm").read_text()
    assert log.count("begin ") == 2
    assert log.count("stopped, everything is saved") == 1


def test_an_interrupted_task_exits_with_75_on_slurm(jobs, tmp_path, monkeypatch):
    def stop(job, root, failure):
        raise Stopped

    def requeue(number, frame):
        sys.exit(-1)

    monkeypatch.setattr(executors, "train", stop)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    before = signal.signal(signal.SIGUSR1, requeue)
    try:
        with pytest.raises(SystemExit) as ended:
            Task(jobs[0], tmp_path)()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended.value.code == 75


def test_what_would_be_submitted_can_be_read(jobs, tmp_path):
    text = sbatch(jobs, tmp_path, given("--max-parallel", "1", "--time-limit", "90", "--partition", "gpu"))
    for line in ("--array=0-1%1", "--array=0-0%1", "--time=90", "--signal=USR1@120", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in text
    assert text.count("--dependency=afterany") == 1
    assert f"# 1: {jobs[1]}" in text
    assert "gpus" not in text
    assert "--gpus-per-node=1" in sbatch(jobs, tmp_path, parser("fig5", "").parse_args([]))


def test_jobs_that_need_others_come_in_a_second_wave(jobs, smoke_study, tmp_path):
    assert waves(jobs, tmp_path) == [jobs[:2], jobs[2:]]
    assert waves(jobs, smoke_study) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "rya"], "unknown --executor 'rya': did you mean ray"),
        (["--executor", "slurm"], "--executor slurm: .*--dry-run prints what would be submitted"),
        (["--cpus-per-run", "0"], "--cpus-per-run must be greater than 0"),
        (["--gpus-per-run", "-1"], "--gpus-per-run must be at least 0"),
        (["--ray-address", "auto"], "--ray-address is for --executor ray"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path, capsys):
    assert main("fig5", ["--protocol", "smoke", "--runs", str(tmp_path / "runs"), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_figures_of_finished_runs_need_no_cluster(smoke_study, tmp_path, capsys):
    more = ["--runs", str(smoke_study), "--figures", str(tmp_path), "--executor", "ray", "--ray-address", "nowhere:1"]
    assert main("fig5", ["--protocol", "smoke", *more]) == 0
    assert (tmp_path / "fig5.png").exists()
    assert len(pl.tables.list_runs(smoke_study)) > 3
