"""The graph of a study is by level: a control of a level starts when its run has finished this level."""

import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from experiments.study.executors import here, ray
from experiments.study.executors.worker import log_of, train
from experiments.study.jobs import Control, Imp, Transplant, ready
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.config import preset
from tests.experiments.study.support import same_as
from tests.support import DEADLOCK, ROOT, wait_for

RUN = Imp(preset("smoke", arch="lenet"))
CONTROL = Control(RUN, "shuffle_even", (1, 2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a finished run and control."""
    root = tmp_path_factory.mktemp("whole")
    assert here.carry_out([RUN, CONTROL], root) == {}
    return root


def train_to(level, root):
    """Train the run to one of its levels, as if it were training the next one now."""
    run_imp(replace(RUN.config, levels=level, run_dir=str(RUN.folder(root).path)))


def test_levels_are_ready_when_their_run_has_finished_them_and_all_before(tmp_path):
    assert ready(RUN, tmp_path) == RUN
    assert ready(CONTROL, tmp_path) is None
    train_to(0, tmp_path)
    assert ready(CONTROL, tmp_path) is None
    train_to(1, tmp_path)
    assert ready(RUN, tmp_path) == RUN
    assert ready(CONTROL, tmp_path) == replace(CONTROL, levels=(1,))
    assert ready(Transplant(RUN, (2,)), tmp_path) is None
    train_to(2, tmp_path)
    assert ready(RUN, tmp_path) is None
    assert ready(CONTROL, tmp_path) == CONTROL
    (RUN.folder(tmp_path).path / "level_00" / "level.json").unlink()
    assert ready(CONTROL, tmp_path) is None, "level 0 is trained again, and so may be the others"


def test_a_control_is_trained_while_another_process_trains_its_run(whole, tmp_path, monkeypatch):
    train_to(1, tmp_path)
    started, trained, order = threading.Event(), threading.Event(), []

    def other_process():
        with RUN.folder(tmp_path).lock():
            started.set()
            trained.wait()

    for kind in (Imp, Control):

        def run(job, root, do=kind.run):
            do(job, root)
            order.append(job)
            trained.set()

        monkeypatch.setattr(kind, "run", run)
    monkeypatch.setattr(here, "WAIT_SECONDS", 0.02)
    thread = threading.Thread(target=other_process)
    thread.start()
    started.wait()
    assert here.carry_out([RUN, CONTROL], tmp_path) == {}
    thread.join()
    assert order == [replace(CONTROL, levels=(1,)), RUN, replace(CONTROL, levels=(2,))]
    assert same_as(whole, tmp_path) == 2


class FakeRay:
    """Tasks that run when they are waited for; that of the run is at work when it is first looked at."""

    def __init__(self, root):
        self.root, self.started, self.looks = root, [], 0

    def start(self, job):
        self.started.append(job)
        return len(self.started) - 1

    def wait(self, refs, timeout):
        self.looks += 1
        if self.looks == 1:
            train_to(1, self.root)
            return [], refs
        last = max(refs)
        assert train(self.started[last], self.root) is None
        return [last], [ref for ref in refs if ref != last]

    def get(self, ref):
        return None


def test_a_control_is_a_task_again_when_it_has_more_tickets(whole, tmp_path):
    fake = FakeRay(tmp_path)
    assert ray._carry_out(fake, fake.start, [RUN, CONTROL], tmp_path) == {}
    assert fake.started == [RUN, CONTROL, CONTROL]
    begun = [line for line in log_of(CONTROL, tmp_path).read_text().splitlines() if line.startswith("begin ")]
    assert [line.partition(", levels ")[2].partition(",")[0] for line in begun] == ["[1]", "[2]"]
    assert same_as(whole, tmp_path) == 2


def test_what_is_made_from_a_failed_run_fails(tmp_path):
    class Failing(FakeRay):
        def wait(self, refs, timeout):
            return refs, []

        def get(self, ref):
            return "it diverged"

    fake = Failing(tmp_path)
    failed = ray._carry_out(fake, fake.start, [RUN, CONTROL], tmp_path)
    assert {job: str(error) for job, error in failed.items()} == {
        RUN: "it diverged", CONTROL: "the run that it is made from failed",
    }  # fmt: skip
    assert fake.started == [RUN]


STUDY = """
import sys
from pathlib import Path
from experiments.study.executors.here import carry_out
from tests.experiments.study.test_jobs import CONTROL, RUN
carry_out([RUN, CONTROL], Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_study_that_is_killed_between_levels_ends_with_the_same_bits(whole, tmp_path):
    """It is killed at the control's level 1, while this process trains the run, whose level 1 is its last yet."""
    train_to(1, tmp_path)
    with RUN.folder(tmp_path).lock():
        process = subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path)], cwd=ROOT)
        wait_for((CONTROL.folder(tmp_path).path / "level_01" / "ticket.safetensors").exists, process)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLOCK)
    assert here.carry_out([RUN, CONTROL], tmp_path) == {}
    assert same_as(whole, tmp_path) == 2
