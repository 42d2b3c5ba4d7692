import os
import signal
import subprocess
import sys
import threading

import pyro_lottery as pl
from experiments import fig5
from experiments.command import main, parser, study_of
from experiments.study.executors import here
from experiments.study.executors.here import carry_out
from experiments.study.executors.worker import log_of
from experiments.study.jobs import Control, Imp, Transplant, unfinished
from pyro_lottery.errors import Diverged
from pyro_lottery.runs.config import preset
from tests.support import ROOT, wait_for


def study(*arguments):
    return study_of(parser("x", "").parse_args(["--protocol", "smoke", *arguments]))


def test_a_run_is_found_by_its_config_whatever_its_name(smoke_study, tmp_path):
    job = study().imp("lenet", 0)
    folder = job.folder(smoke_study)
    assert folder.results()
    (tmp_path / "runs").mkdir()
    os.symlink(folder.path, tmp_path / "runs" / "my favourite run")
    assert job.folder(tmp_path / "runs").path.name == "my favourite run"
    assert unfinished(job, tmp_path / "runs") == []
    assert unfinished(study().imp("lenet", 1), tmp_path / "runs") == [0, 1, 2]
    assert unfinished(study().imp("lenet", 0, lr=0.5), tmp_path / "runs") == [0, 1, 2]
    assert unfinished(study("--precision", "auto").imp("lenet", 0), tmp_path / "runs") == []
    assert unfinished(study("--precision", "bf16").imp("lenet", 0), tmp_path / "runs") == [0, 1, 2]
    assert unfinished(Control(job, "reinit", (1, 2)), smoke_study) == [1]


def test_more_seeds_keep_the_runs_of_fewer():
    few, many = (fig5.jobs(study("--seeds", n)) for n in ("1", "3"))
    assert set(few) < set(many)
    assert len(many) == 3 * len(few)


def test_one_failed_run_does_not_stop_the_others(tmp_path, monkeypatch):
    done, run = [], Imp(preset("smoke", arch="lenet"))
    bad = Imp(preset("smoke", arch="lenet", seed=1))
    jobs = [bad, Control(bad, "reinit", (1,)), Transplant(bad, (1,)), run]

    def train(job, root):
        if job == bad:
            raise Diverged("the loss is not finite", 1, 1, [])
        done.append(job)

    monkeypatch.setattr(Imp, "run", train)
    failed = carry_out(jobs, tmp_path)
    assert done == [run]
    assert set(failed) == set(jobs[:3])
    log = log_of(bad, tmp_path)
    assert str(failed[bad]) == f"the loss is not finite; see {log}"
    assert "Diverged: the loss is not finite" in log.read_text()


def test_what_no_run_can_do_is_bad_input(tmp_path, capsys):
    more = ["--protocol", "reduced", "--dataset", "folder", "--data-dir", str(tmp_path), "--runs", str(tmp_path / "r")]
    assert main("fig5", more) == 2
    said = capsys.readouterr()
    assert "no folder train/" in said.err
    assert said.out == "", "the line comes before the first run"
    assert not (tmp_path / "r").exists()


def test_what_failed_is_said_whatever_can_be_drawn(tmp_path, monkeypatch, capsys):
    def diverge(job, root):
        raise Diverged("the loss is not finite", 1, 1, [])

    monkeypatch.setattr(Imp, "run", diverge)
    assert main("fig3", ["--protocol", "smoke", "--runs", str(tmp_path)]) == 1
    assert "1 of 1 runs failed: lenet, mean_field, snr, seed 0: the loss is not finite" in capsys.readouterr().err


def test_a_run_at_which_another_process_is_at_work_comes_later(tmp_path, monkeypatch):
    first, second = (Imp(preset("smoke", arch="lenet", seed=seed, levels=0)) for seed in (0, 1))
    started, trained, order = threading.Event(), threading.Event(), []
    lock = first.folder(tmp_path)

    def other_process():
        with lock.lock():
            started.set()
            trained.wait()

    run = Imp.run

    def train(job, root):
        run(job, root)
        order.append(job)
        trained.set()

    monkeypatch.setattr(Imp, "run", train)
    monkeypatch.setattr(here, "WAIT_SECONDS", 0.02)
    thread = threading.Thread(target=other_process)
    thread.start()
    started.wait()
    assert carry_out([first, second], tmp_path) == {}
    thread.join()
    assert order == [second, first]


def test_killed_and_repeated_it_ends_the_same(smoke_study, tmp_path):
    arguments = [sys.executable, "-m", "experiments.fig5", "--protocol", "smoke", "--runs", str(tmp_path)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("*deterministic*/level_01/*")), process)  # the second run's second level
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main("fig5", ["--protocol", "smoke", "--runs", str(tmp_path)]) == 0
    for path in tmp_path.rglob("results.csv"):
        again, whole = pl.load_run(path.parent), pl.load_run(smoke_study / path.parent.relative_to(tmp_path))
        columns = [c for c in whole.results if c not in ("train_seconds", "step_ms", "predict_ms")]
        assert again.results[columns].equals(whole.results[columns])
    assert len(list(tmp_path.rglob("results.csv"))) == 3
    numbers = [(root / "figures" / "fig5.csv").read_text() for root in (tmp_path, smoke_study)]
    assert numbers[0] == numbers[1]


def test_one_figure_alone(smoke_study, tmp_path):
    arguments = ["--protocol", "smoke", "--runs", str(smoke_study), "--figures", str(tmp_path / "figures")]
    assert main("fig3", arguments) == 0
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"fig3.png", "fig3.svg", "fig3.csv"}
