import os
import signal
import stat
import subprocess
import sys

import pytest
import torch

from pyro_lottery import files, untrusted
from pyro_lottery.errors import Damaged
from tests.support import FSYNC, wait_for

TENSORS = {"a/x": torch.randn(3, 2), "b": torch.arange(4), "c": torch.tensor(True), "d": torch.empty(0)}


def test_round_trip_and_equal_files_for_equal_tensors(tmp_path):
    for name in ("one", "two"):
        files.save_tensors(tmp_path / name, dict(TENSORS), {"epoch": 3, "list": [1.5, None]})
    tensors, info = untrusted.load_tensors(tmp_path / "one")
    assert info == {"epoch": 3, "list": [1.5, None]}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in TENSORS.items())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"], "no temporary file may stay"


@pytest.mark.parametrize("position", [0, 12, -1])
def test_a_flipped_byte_is_damage(tmp_path, position):
    path = tmp_path / "t"
    files.save_tensors(path, TENSORS)
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"t (cannot be read|fails its checksum)"):
        untrusted.load_tensors(path)


def test_every_byte_of_the_header_counts(tmp_path):
    """A file that loads after one byte was changed holds what it held."""
    path = tmp_path / "t"
    files.save_tensors(path, {"x": torch.arange(3.0)}, {"sites": ["x"], "draws": 20})
    data = path.read_bytes()
    for position in range(len(data)):
        for change in (1, 16):
            changed = bytearray(data)
            changed[position] ^= change
            path.write_bytes(changed)
            try:
                tensors, info = untrusted.load_tensors(path)
            except Damaged:
                continue
            assert info == {"sites": ["x"], "draws": 20}
            assert torch.equal(tensors["x"], torch.arange(3.0))


def test_what_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        untrusted.load_tensors(tmp_path)


def test_a_truncated_or_foreign_file_is_damage(tmp_path):
    path = tmp_path / "t"
    files.save_tensors(path, TENSORS)
    for content in (path.read_bytes()[:-3], b"", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(Damaged, match="cannot be read"):
            untrusted.load_tensors(path)
    with pytest.raises(FileNotFoundError):
        untrusted.load_tensors(tmp_path / "none")


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t"
    files.write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["t"]


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_afterwards(tmp_path, monkeypatch):
    done = []

    def flush(descriptor):
        FSYNC(descriptor)
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)

    replace = os.replace
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), done.append("renamed")))
    files.write_atomic(tmp_path / "file", b"12345")
    assert done == [5, "renamed", "folder"]


@pytest.mark.slow
def test_kill_nine_while_the_file_is_written_again_leaves_a_whole_file(tmp_path):
    """A temporary file is there from the first written byte to the rename."""
    path = tmp_path / "t"
    code = (
        "import sys, itertools, pathlib, torch; from pyro_lottery import files\n"
        "for i in itertools.count(): files.save_tensors(pathlib.Path(sys.argv[1]), {'x': torch.full((200_000,), float(i))})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    wait_for(lambda: path.exists() and list(tmp_path.glob("*.tmp")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    x = untrusted.load_tensors(path)[0]["x"]
    assert (x == x[0]).all()


def test_numbers_that_torch_cannot_check_are_damage(tmp_path):
    files.save_tensors(tmp_path / "t", {"x": torch.zeros(2).to(torch.float8_e4m3fn)})
    with pytest.raises(Damaged, match=r"x is torch\.float8"):
        untrusted.load_tensors(tmp_path / "t")


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.write_atomic(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo()
