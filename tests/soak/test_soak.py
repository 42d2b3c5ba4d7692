"""The short soak: the command of tests/README.md, each part a few times."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.soak.__main__ import PARTS
from tests.support import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    command = re.search(r"^python (-m tests\.soak .*)$", (ROOT / "tests" / "README.md").read_text(), re.M).group(1)
    short = ["--kills", "4", "--stops", "2", "--every", "50", "--mutations", "300", "--commands", "40"]
    short += ["--ranks", "1", "--loops", "0"]  # the other tests keep the machine busy
    run = subprocess.run(
        [sys.executable, *shlex.split(command), *short],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(re.findall(rf"^({'|'.join(PARTS)}): ", run.stdout, re.M)) == len(PARTS)
    return json.loads((folder / "soak.json").read_text())


def test_killed_runs_end_as_if_they_had_not_been(figures):
    found = figures["kills"]
    assert found["kills"] == found["resumed"] == found["ended identical"] >= 4


def test_stopped_runs_exit_75_soon(figures):
    found = figures["stops"]
    assert found["SIGTERMs"] == found["exit 75"] == found["ended identical"] == 2
    assert found["longest, s"] < 10


def test_bad_input_on_two_ranks_is_one_line_and_exit_2(figures):
    assert figures["ranks"]["exit 2"] == 1
    assert figures["ranks"]["otherwise"] == 0, figures["ranks"]["what"]


def test_failing_writes_are_reported_and_leave_no_corrupt_level(figures):
    found = figures["faults"]
    assert found["faults"] >= 10
    assert found["corrupt finished levels"] == found["unreported"] == 0
    assert found["otherwise"] == []
    assert found["ended identical when repeated"] == found["faults"]
    assert found["reported in one line, exit 1 or 2"] >= found["faults"] // 2


def test_changed_files_are_refused_in_one_line(figures):
    found = figures["damaged_files"]
    assert found["files"] >= 250
    assert found["silently wrong"] == found["tracebacks"] == found["refused in several lines"] == 0, found["what"]
    assert found["slowest, s"] < 10
    assert found["most memory that one took, MiB"] < 20 * found["largest file, MiB"]
    assert found["bombs refused"] == "10 of 10"


def test_random_command_lines_exit_with_0_or_2(figures):
    found = figures["random_commands"]
    assert found["otherwise"] == 0, found["what"]
    assert found["exit 0"] + found["exit 2"] == found["commands"] == 40
    assert found["exit 0"] > 0


def test_of_two_processes_one_works_and_the_other_is_told_or_waits(figures):
    found = figures["together"]
    assert found["exit codes on one empty folder"] == ["0", "2"]
    assert found["the other is told of"].startswith("(pid ")
    assert found["exit codes on one missing download"] == [0, 0]
    assert found["downloads"] == 1
