"""Wall times and critical paths, counted by hand."""

import pytest

from experiments.command import FIGURES, jobs_of, parser, study_of
from experiments.study.jobs import Control, Imp, Transplant
from experiments.study.walltime import Work, critical_path, makespan, trainings
from pyro_lottery.runs.config import preset

A, B, C = (Imp(preset("smoke", arch="lenet", seed=seed)) for seed in range(3))
A1, A2, B1 = Control(A, "reinit", (1,)), Control(A, "shuffle_even", (1,)), Transplant(B, (1,))


def levels(*seconds, first=0, start=0.0):
    return Work(start, dict(enumerate(seconds, first)))


def test_wall_time_by_hand():
    work = {
        A: levels(4, 3, 3), A1: levels(4, first=1), A2: levels(5, first=1), B: levels(1, 1, 1), B1: levels(2, first=1),
        C: levels(1),
    }  # fmt: skip
    assert makespan(work, 1) == 10 + 4 + 5 + 3 + 2 + 1
    # one worker: A to 10, A2 to 15; the other: B to 3, B1 to 5, C to 6, then it waits for A's level 1 at 7, A1 to 11
    assert makespan(work, 2) == 15
    # one worker: A to 10; the others: B to 3, C to 1, B1 from 2, when B's level 1 is finished, to 4; A1 and A2 from 7 on
    assert makespan(work, 3) == 12
    assert makespan(work, 100) == critical_path(work) == 12
    assert makespan({A1: levels(4, first=1)}, 2) == critical_path({A1: levels(4, first=1)}) == 4, "its ticket exists"
    assert makespan({}, 3) == critical_path({}) == trainings({}) == 0


def test_a_control_that_has_caught_up_gives_its_worker_back():
    work = {A: levels(4, 4, 4, start=1), A1: levels(1, 1, first=1, start=1), C: levels(3, start=1)}
    # A: start to 1, levels at 5, 9 and 13; beside it C to 4; A1 waits to 9, begins, trains level 1 to 11; level 2 is there
    # at 13, so it begins again, to 15
    assert makespan(work, 2) == critical_path(work) == 15
    assert trainings(work) == 4


def test_levels_that_were_finished_before_need_no_ticket():
    work = {A: levels(5, first=2), A1: levels(1, 1, first=1)}
    assert critical_path(work) == makespan(work, 2) == 6, "level 1 at once, level 2 after the run's"
    again = {A: levels(5, first=0), A1: levels(1, first=1)}
    assert critical_path(again) == makespan(again, 2) == 6, "level 0 is trained again, so level 1 waits for it"


@pytest.mark.parametrize(("protocol", "expected"), [("paper", 22), ("fast", 11), ("reduced", 7), ("smoke", 4)])
def test_the_critical_path_of_a_protocol_is_its_levels_the_dense_one_and_the_last_control(protocol, expected):
    """The paper's is 21 trainings of a run and one of its last control; 41 if controls waited for the whole run."""
    study = study_of(parser("all", "").parse_args(["--protocol", protocol]))
    work = {job: Work(0.0, dict.fromkeys(job.levels, 1.0)) for job in jobs_of(FIGURES, study)}
    assert trainings(work) == critical_path(work) == expected
