"""Runs of which one writing call fails."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from pyro_lottery.errors import Damaged
from pyro_lottery.runs.config import from_json
from pyro_lottery.runs.folder import RunFolder
from tests.soak.child import KINDS, Figures, start, undisturbed
from tests.support import fingerprint


def faults(root: Path, every: int) -> Figures:
    """Each kind of fault at every ``every``-th writing call of a run: is it reported, is what counts as finished whole, and
    does the same command end the run as if nothing had been?
    """
    whole, calls, _ = undisturbed(root)
    expected, found = fingerprint(whole), Counter[str]()
    silent: list[str] = []
    for kind in KINDS[1:6]:
        for at in range(1, calls[kind] + 1, every):
            folder = root / "faulty"
            child = start(folder, at, kind)
            code, lines = child.wait(600), child.complaints()
            found["faults"] += 1
            if code == 0:
                found["without effect" if fingerprint(folder) == expected else "unreported"] += 1
            elif code in (1, 2) and len(lines) == 1:
                found["reported in one line, exit 1 or 2"] += 1
            else:
                silent.append(f"{kind} at {at}: exit {code}, {lines[-1:]}")
            found["corrupt finished levels"] += _corrupt(folder)
            again = start(folder)
            found["ended identical when repeated"] += again.wait(600) == 0 and fingerprint(folder) == expected
            shutil.rmtree(folder)
    for name in ("unreported", "corrupt finished levels"):
        found[name] += 0
    return {"writing calls": calls["kill"], **found, "otherwise": silent}


def _corrupt(folder: Path) -> int:
    """Finished levels whose files are not whole."""
    if not (folder / "config.json").exists():
        return 0
    run, corrupt = RunFolder(folder), 0
    config = from_json(run.config)
    for row in run.results():
        try:
            run.level(row.level).check(config.epochs_of(row.level))
        except Damaged:
            corrupt += 1
    return corrupt
