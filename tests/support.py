"""What tests share."""

import time

DEADLOCK = 3600.0
"""Seconds after which a process that a test started is taken for stuck; one beside other work may need many minutes."""


def wait_for(condition, process=None):
    """Wait until ``condition()`` holds, while ``process`` is running, where one brings it about."""
    end = time.monotonic() + DEADLOCK
    while not condition():
        assert process is None or process.poll() is None, f"the process ended early with {process.returncode}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
