"""Pickles that run code when they are read."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

import pyro_lottery as pl
from pyro_lottery import untrusted, weights
from pyro_lottery.errors import Damaged
from pyro_lottery.runs.folder import RunFolder


class _Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def bombs(root: Path, whole: Path) -> str:
    """Pickles that run code, under the names of tickets, posteriors, checkpoints and state_dicts, in two formats."""
    fuse, refused = root / "exploded", 0
    shutil.copytree(whole, root / "bombs")
    level = RunFolder(root / "bombs").level(0)
    plain, zipped = root / "plain.pt", root / "zipped.pt"
    plain.write_bytes(pickle.dumps({"state_dict": _Bomb(fuse)}))
    torch.save({"state_dict": _Bomb(fuse)}, zipped)
    for bomb in (plain, zipped):
        renamed = bomb.with_suffix(".safetensors")
        for target in (renamed, *(level.path / f"{n}.safetensors" for n in ("ticket", "posterior", "checkpoint"))):
            shutil.copy(bomb, target)
        for read, more in (
            (level.load_ticket, ()), (level.load_posterior, ()), (untrusted.load_tensors, (level.checkpoint,)),
            (weights.load, (bomb,)), (weights.load, (renamed,)),
        ):  # fmt: skip
            try:
                read(*more)
            except (Damaged, pl.UserError):
                refused += 1
    return f"{refused} of 10" + (", BUT CODE HAS RUN" if fuse.exists() else "")
