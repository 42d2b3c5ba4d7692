import os
import signal

import pytest
import torch

from pyro_lottery.errors import Stopped, UserError
from pyro_lottery.runs.cli import run_command
from pyro_lottery.runs.signals import signals


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("one\ntwo"), 2, "prog: one"),
        (OSError(28, "No space left on device", "runs/x"), 1, "prog: runs/x: No space left on device"),
        (Stopped(), 75, "prog: stopped, everything is saved; to resume: prog --run-dir 'two words'"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 80 GiB"
            ),
            1,
            "prog: the GPU's memory is full (no 2.50 GiB are left); a smaller --batch-size or --precision bf16 needs less. If another "
            "process fills the memory, the same command resumes when that has ended",
        ),
        (
            KeyboardInterrupt(),
            130,
            "prog: interrupted; what was saved is undamaged, and the same command resumes from it",
        ),
    ],
)
def test_each_end_has_its_code_and_one_line(error, code, line, capsys):
    assert run_command("prog", lambda: fail(error), ["--run-dir", "two words"]) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with signals() as received, received.heeded():
        os.kill(os.getpid(), number)
        assert received == [number]
    assert signal.getsignal(number) is before


def test_a_signal_within_a_run_is_heard_by_the_study_too():
    with signals() as study, study.heeded():
        with signals() as run:
            os.kill(os.getpid(), signal.SIGTERM)
            assert run == [signal.SIGTERM]
        assert study == [signal.SIGTERM]
        with signals() as next_run:
            assert next_run


def test_a_second_sigint_interrupts():
    with signals() as received, received.heeded():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_where_nothing_is_unsaved_a_signal_stops_at_once():
    with signals(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_training_stops_a_command_too(number, capsys):
    """While results are shown after the last level, for instance: the process is not killed in the middle of a line."""
    before = signal.getsignal(number)
    assert run_command("python -m it", lambda: signal.raise_signal(number), ["RUN"]) == 75
    assert capsys.readouterr().err == "python -m it: stopped, everything is saved; to resume: python -m it RUN\n"
    assert signal.getsignal(number) is before
