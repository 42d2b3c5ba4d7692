"""Level 0 from another run that trained the same one: checked, then copied. Each run keeps files of its own, so that damage to
one run's files is not damage to the other's.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pyro_lottery import files
from pyro_lottery.errors import Damaged, NotShared, UserError
from pyro_lottery.runs.build import PRETRAINED
from pyro_lottery.runs.config import AFTER_LEVEL_0, LATER, MOVING, RESUMABLE, Config, from_json
from pyro_lottery.runs.folder import ORIGINS, RunFolder
from pyro_lottery.runs.level_folder import MANIFEST, REWIND, LevelFolder
from pyro_lottery.runs.manifest import Manifest
from pyro_lottery.types import Ticket, ticket_checksum

_FREE = AFTER_LEVEL_0 | RESUMABLE - {"deterministic", "sparse"}
"""Options that may differ between two runs with the same level 0, bit for bit; ``score`` only where no schedule moves its mask."""
_FACTS = (*ORIGINS, "data", PRETRAINED, "versions", "hardware", "kernels", "streams")
"""Facts of ``config.json`` that must be equal: those that the last bits of a training depend on."""


def gives_level_0(source: Config, config: Config) -> bool:
    """Whether the options of a run ``source`` train the level 0 that a run of ``config`` needs.

    Late rewinding also needs the rewind point, which only a run with the same K saves.

    >>> from pyro_lottery.runs.config import preset
    >>> first, late = preset("quick"), preset("quick", rewind="epoch:1")
    >>> gives_level_0(first, preset("quick", score="magnitude", rewind="lr")), gives_level_0(first, preset("quick", lr=0.1))
    (True, False)
    >>> gives_level_0(first, late), gives_level_0(late, first), gives_level_0(late, preset("quick", rewind="restart:1"))
    (False, True, True)
    """
    return next(_other_options(source, config), None) is None


def check_level_0(source: RunFolder, config: Config, facts: Mapping[str, Any], ticket: Ticket) -> Manifest:
    """Check that ``source`` has finished the level 0 that a run of ``config`` with ``facts`` trains from ``ticket``.

    Returns the manifest that such a run writes. Raises ``NotShared`` if ``source`` trained another level 0, has not finished it,
    or has damaged files.
    """
    try:
        found = source.config
        theirs = from_json(LATER | found)
        if "own" in found or "own" in facts:
            raise UserError("level 0 of a network made in Python is not shared")
        for what, there, here in (*_other_options(theirs, config), *_other_facts(found, json.loads(json.dumps(facts)))):
            raise UserError(f"its {what} is {there}, here it is {here}")
        level = source.level(0)
        if level.load_divergence() or RunFolder(str(config.run_dir)).level(0).load_divergence():
            raise UserError("level 0 diverged, there or here, and is trained with half the learning rate")
        manifest = level.check(theirs.epochs_of(0))
        if manifest is None:
            raise UserError("its level 0 is not finished")
        if manifest.ticket != ticket_checksum(ticket):
            raise UserError("its level 0 was trained from other initial values")
    except (UserError, Damaged) as error:
        raise NotShared(
            f"--level0-from {source.path} cannot be used: {error}; name another run, or leave the option out"
        ) from error
    wanted = {name: crc for name, crc in manifest.files.items() if name != REWIND or config.rewind_epoch}
    return replace(manifest, files=wanted)


def copy_level_0(source: RunFolder, manifest: Manifest, target: LevelFolder) -> None:
    """Copy the files of ``manifest`` from level 0 of ``source`` to ``target``, and write the manifest last.

    Raises ``NotShared`` if a file has changed since it was checked.
    """
    for name, crc in manifest.files.items():
        path = source.level(0).path / name
        try:
            files.check_regular(path)
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        if f"{zlib.crc32(content):08x}" != crc:
            raise NotShared(f"{path} has changed while level 0 was copied; repeat the command")
        (target.path / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(target.path / name, content)
    manifest.save(target.path / MANIFEST)


def _other_options(theirs: Config, ours: Config) -> Iterator[tuple[str, Any, Any]]:
    """The options by which a run ``theirs`` has another level 0 than a run ``ours`` needs: name and both values."""
    for name, value in theirs.options().items():
        free = _FREE - ({"score"} if ours.schedule in MOVING else set())  # whose score moves the mask of level 0
        if name not in free and value != getattr(ours, name):
            yield name, value, getattr(ours, name)
    if ours.rewind_epoch not in (0, theirs.rewind_epoch):
        yield "rewind", theirs.rewind, ours.rewind


def _other_facts(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The facts that differ between two runs: name and both values."""
    for name in (*_FACTS, *(("code",) if "code" in theirs else ())):  # which earlier runs have not recorded
        there, here = theirs.get(name), ours.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            keys = sorted(there.keys() | here.keys())
            yield from (
                (f"{name} {key}", there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)
            )
        elif there != here:
            yield name, there, here
