"""One process at a time works in a run folder."""

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
    """Keep other processes out of ``folder``, which is made if need be; ``Busy`` names the process that is at work in it.

    The lock is the operating system's, which releases it when its process dies.
    """
    owner = folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise Busy(
            f"another process{_named_in(owner)} is at work in {folder}; wait for it, or choose another --run-dir"
        ) from None
    except OSError as error:
        raise not_writable(folder, error) from error
    except NotImplementedError as error:
        raise UserError(f"{folder} is on a file system without locks; choose another --run-dir") from error
    try:
        with suppress(OSError):  # the owner's name is a courtesy: whatever matters will report a full disk
            # An atomic write replaces the file, so it does not follow a link in a foreign folder.
            files.write_atomic(owner, f"pid {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def is_busy(folder: Path) -> bool:
    """Whether another process is at work in ``folder`` now."""
    if not (folder / ".lock").exists():
        return False
    try:
        with locked(folder):
            return False
    except Busy:
        return True


def not_writable(folder: Path, error: OSError) -> Exception:
    """The ``UserError`` for a ``folder`` that cannot be written; ``error`` itself for a full or failing disk."""
    if isinstance(error, FileExistsError):
        return UserError(f"--run-dir {folder} is a file; choose a folder")
    if not files.is_refused(error):
        return error
    return UserError(f"{folder} cannot be written ({error.strerror}); make it writable, or choose another folder")


def _named_in(owner: Path) -> str:
    """The lock's owner, in brackets; empty if it could not write its name."""
    for _ in range(20):  # the owner writes its name just after it has the lock
        with suppress(OSError, ValueError):
            return f" ({untrusted.read_text(owner).strip()[:100]})"
        time.sleep(0.05)
    return ""
