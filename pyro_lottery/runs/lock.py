"""The lock that lets only one process at a time write to a run folder."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from pyro_lottery import files, untrusted
from pyro_lottery.errors import Busy, UserError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other processes; creates it if it does not exist.

    Uses an OS lock, which is released when its process dies. Raises ``Busy``, which names the process that holds the lock, and
    ``UserError`` if the folder cannot be written or its file system has no locks.
    """
    owner = folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise Busy(
            f"another process{_named_in(owner)} is using {folder}; wait for it, or choose another --run-dir"
        ) from None
    except OSError as error:
        raise not_writable(folder, error) from error
    except NotImplementedError as error:
        raise UserError(f"{folder} is on a file system without locks; choose another --run-dir") from error
    try:
        with suppress(OSError):  # the owner's name is optional; other writes will report a full disk
            # An atomic write replaces the file, so it does not follow a symbolic link in a foreign folder.
            files.write_atomic(owner, f"pid {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def is_busy(folder: Path) -> bool:
    """Whether another process holds the lock of ``folder`` now."""
    if not (folder / ".lock").exists():
        return False
    try:
        with locked(folder):
            return False
    except Busy:
        return True


def not_writable(folder: Path, error: OSError) -> Exception:
    """A ``UserError`` if ``error`` means that ``folder`` cannot be written; otherwise, as for a full disk, ``error`` itself."""
    if isinstance(error, FileExistsError):
        return UserError(f"--run-dir {folder} is a file; choose a folder")
    if not files.is_refused(error):
        return error
    return UserError(f"{folder} cannot be written ({error.strerror}); make it writable, or choose another folder")


def _named_in(owner: Path) -> str:
    """The owner of the lock, in brackets; empty if its name cannot be read."""
    for _ in range(20):  # the owner writes its name just after it acquires the lock
        with suppress(OSError, ValueError):
            return f" ({untrusted.read_text(owner).strip()[:100]})"
        time.sleep(0.05)
    return ""
