import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest

import pyro_lottery as pl
from experiments.command import FIGURES, jobs_of, main, study_of
from experiments.study.executors.worker import log_of, train
from experiments.study.jobs import Imp, share_level_0
from tests.experiments.study.support import given, same_as
from tests.support import DEADLOCK, ROOT, wait_for


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_ray_runs_all_figures_though_a_worker_is_killed_and_trains_nothing_twice(jobs, smoke_study, tmp_path):
    command = [
        sys.executable, "-m", "experiments.all", "--protocol", "smoke", "--executor", "ray", "--cpus-per-run", "1",
        "--runs", str(tmp_path),
    ]  # fmt: skip
    every, killed = share_level_0(jobs_of(FIGURES, study_of(given()))), jobs[1]
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
        copied = isinstance(job, Imp) and job.shares is not None  # level 0, which another run trains
        again = text.count("epoch 1/1") - len(job.levels) + copied
        assert again in ((0, 1) if job == killed else (0,)), "the level at which it was killed, once more"


def test_a_failed_run_is_told_with_its_log_and_stops_no_other(jobs, tmp_path):
    folder = jobs[1].folder(tmp_path).path
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("")
    failure = train(jobs[1], tmp_path)
    assert failure.endswith(f"see {log_of(jobs[1], tmp_path)}")
    assert "not empty and is not a run folder" in failure
    assert "Traceback" in log_of(jobs[1], tmp_path).read_text()
    assert train(jobs[2], tmp_path, failure) == "the run that it is made from failed"
    assert train(jobs[0], tmp_path) is None
    before = log_of(jobs[0], tmp_path).read_text()
    assert train(jobs[0], tmp_path) is None
    assert log_of(jobs[0], tmp_path).read_text() == before, "a finished run is not begun again"


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
def test_bad_options_are_one_line(options, message, tmp_path, refused):
    refused(partial(main, "fig5"), ["--protocol", "smoke", "--runs", str(tmp_path / "runs"), *options], message)


def test_figures_of_finished_runs_need_no_cluster(smoke_study, tmp_path, capsys):
    more = ["--runs", str(smoke_study), "--figures", str(tmp_path), "--executor", "ray", "--ray-address", "nowhere:1"]
    assert main("fig5", ["--protocol", "smoke", *more]) == 0
    assert (tmp_path / "fig5.png").exists()
    assert len(pl.tables.list_runs(smoke_study)) > 3
