"""Runs that are killed and stopped, and then repeated to their end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

from tests.soak.child import Figures, start, undisturbed
from tests.support import fingerprint


def kills(root: Path, count: int) -> Figures:
    """SIGKILL ``count`` times: at random moments, and at random writing calls; every run is repeated to its end."""
    whole, calls, seconds = undisturbed(root)
    rng, expected = random.Random(0), fingerprint(whole)
    done = resumed = equal = runs = inside = 0
    while done < count:
        folder = root / f"killed{runs}"
        runs += 1
        killed = 0
        while True:
            at_call = rng.random() < 0.5 and done < count
            child = start(folder, rng.randint(1, calls["kill"] // 2), "kill") if at_call else start(folder)
            if not at_call and done < count and child.wait(rng.uniform(0, seconds / 2)) is None:
                os.kill(child.pid, signal.SIGKILL)
            code = child.wait(600)
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"exit {code} after {killed} kills: {child.log.read_text()}"
            killed, done, inside = killed + 1, done + 1, inside + at_call
        resumed += killed
        equal += killed * (fingerprint(folder) == expected)
        shutil.rmtree(folder)
    return {
        "kills": done,
        "of them at a writing call": inside,
        "runs": runs,
        "resumed": resumed,
        "ended identical": equal,
    }


def stops(root: Path, count: int) -> Figures:
    """SIGTERM ``count`` times at random moments of training; exit 75, how soon, and the same results."""
    whole, _, seconds = undisturbed(root)
    rng, expected = random.Random(1), fingerprint(whole)
    done = right = equal = runs = 0
    longest = 0.0
    while done < count:
        folder, stopped = root / f"stopped{runs}", 0
        runs += 1
        while True:
            child = start(folder)
            while not (folder / ".owner").exists() and child.wait(0) is None:
                time.sleep(0.002)
            if done == count or child.wait(rng.uniform(0, seconds / 2)) is not None:
                code = child.wait(600)
                break
            os.kill(child.pid, signal.SIGTERM)
            asked = time.monotonic()
            code = child.wait(60)
            if code == 0:  # it was at its end
                break
            longest = max(longest, time.monotonic() - asked)
            done, stopped = done + 1, stopped + 1
            right += code == 75 and len(child.complaints()) == 1
        equal += stopped * (code == 0 and fingerprint(folder) == expected)
        shutil.rmtree(folder)
    return {"SIGTERMs": done, "exit 75": right, "longest, s": round(longest, 2), "ended identical": equal}
