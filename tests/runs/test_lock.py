import os
import platform
import subprocess
import sys
import threading

import filelock
import pytest

import pyro_lottery as pl
from pyro_lottery.runs.folder import RunFolder


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_free(tmp_path):
    code = "import os, sys; from pyro_lottery.runs.folder import RunFolder\nwith RunFolder(sys.argv[1]).lock(): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert (tmp_path / ".owner").exists()
    with RunFolder(tmp_path).lock():
        assert f"pid {os.getpid()}" in (tmp_path / ".owner").read_text()


def test_one_process_at_a_time(tmp_path):
    refused = pytest.raises(pl.UserError, match=rf"another process \(pid {os.getpid()} on {platform.node()}\) is using")
    with RunFolder(tmp_path).lock(), refused, RunFolder(tmp_path).lock():
        pass
    assert not (tmp_path / ".owner").exists()
    with RunFolder(tmp_path).lock():
        pass


def test_the_owner_is_told_though_it_has_only_just_the_lock(tmp_path):
    """Between taking the lock and writing its name an owner may take a while on a busy machine."""
    with filelock.FileLock(tmp_path / ".lock"):
        late = threading.Timer(0.2, (tmp_path / ".owner").write_text, ["pid 7 on elsewhere\n"])
        late.start()
        with pytest.raises(pl.UserError, match=r"another process \(pid 7 on elsewhere\)"), RunFolder(tmp_path).lock():
            pass
        late.join()


def test_a_folder_is_busy_while_another_process_is_at_work(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.busy()
    with run.lock():
        assert run.busy()
    assert not run.busy()
