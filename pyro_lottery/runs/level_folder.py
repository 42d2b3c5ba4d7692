"""The folder of a level: the name and the format of each of its files."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from pyro_lottery import files, masks, untrusted
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.runs.manifest import Manifest
from pyro_lottery.types import LevelResult, Mask, Posterior, Sites, Ticket, all_finite

TICKET, POSTERIOR, HISTORY, MANIFEST = "ticket.safetensors", "posterior.safetensors", "history.csv", "level.json"
REWIND = f"../rewind/{POSTERIOR}"
"""The posterior that late rewinding goes back to, as a path from ``level_00/``, whose training saves it."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What the files of a level hold."""

    ticket: Ticket
    mask: Mask
    """The mask of the trained network."""
    posterior: Posterior
    net: Sites
    """The network's values that are not random, as trained."""
    history: list[dict[str, float]]


class LevelFolder:
    """``level_NN/``: a level's ticket, posterior, history and manifest, and checkpoints while it trains."""

    def __init__(self, path: Path, number: int | None = None):
        self.path, self.number = path, number
        self.checkpoint = path / "checkpoint.safetensors"
        self.checkpoint_before = path / "checkpoint.before.safetensors"
        self._checkpoint_new = path / "checkpoint.new.safetensors"
        self._damaged = False  # a damaged newest checkpoint must not replace the one before it

    def save_ticket(self, ticket: Ticket) -> None:
        """Write ``ticket.safetensors``: mask/ as uint8 0/1, loc/, scale/, net/."""
        self.path.mkdir(parents=True, exist_ok=True)
        ticket.save(self.path / TICKET)

    def load_ticket(self) -> Ticket:
        """Read ``ticket.safetensors``."""
        return Ticket.load(self.path / TICKET)

    def save_posterior(self, posterior: Posterior, net: Sites, mask: Mask | None = None) -> None:
        """Write ``posterior.safetensors``: loc/, scale/, net/, and mask/ if ``mask`` is not the ticket's."""
        self.path.mkdir(parents=True, exist_ok=True)
        posterior.save(self.path / POSTERIOR, net, mask)

    def load_posterior(self) -> tuple[Posterior, Sites]:
        """Read ``posterior.safetensors``: the posterior, and the network's values that are not random."""
        return Posterior.load(self.path / POSTERIOR)

    def load_moved_mask(self) -> Mask | None:
        """The mask that the level's schedule ended with; None if the mask stayed that of the ticket."""
        return Posterior.load_with_mask(self.path / POSTERIOR)[2]

    def posterior_crc(self) -> str | None:
        """The CRC-32 of ``posterior.safetensors``; None if the file does not exist."""
        try:
            return files.crc32_of(self.path / POSTERIOR)
        except FileNotFoundError:
            return None

    def save_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write ``history.csv``: one row per epoch."""
        files.write_atomic(self.path / HISTORY, as_csv(list(history[0]), history))

    def load_history(self, epochs: int) -> list[dict[str, float]]:
        """Read ``history.csv``, one row per epoch.

        Raises ``UserError`` if it is not a table of numbers, and ``Damaged`` unless it has ``epochs`` rows.
        """
        path = self.path / HISTORY
        try:
            rows = list(csv.DictReader(untrusted.read_text(path).splitlines(), strict=True))
            found = [{n: float(v) for n, v in row.items() if n != files.CRC} for row in rows]
        except (csv.Error, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a table of numbers ({one_line(error)})") from error
        if len(found) != epochs:
            raise Damaged(f"{path} has {len(found)} of {epochs} epochs")
        return found

    def save_checkpoint(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write a checkpoint and read it back; only then is the previous one renamed to ``checkpoint.before``."""
        self.path.mkdir(parents=True, exist_ok=True)
        files.save_tensors(self._checkpoint_new, tensors, info)
        untrusted.load_tensors(self._checkpoint_new)
        if self.checkpoint.exists() and not self._damaged:
            files.replace(self.checkpoint, self.checkpoint_before)
        files.replace(self._checkpoint_new, self.checkpoint)
        self._damaged = False

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that is not damaged, or None; warns of a damaged one."""
        for path in (self.checkpoint, self.checkpoint_before):
            try:
                tensors, info = untrusted.load_tensors(path)
                if not all(all_finite(name, t, info) for name, t in tensors.items()):
                    raise Damaged(f"{path} holds values that are not finite")
                return tensors, info
            except FileNotFoundError:
                continue
            except Damaged as error:
                self._damaged = True
                warnings.warn(
                    f"{error}; training resumes from the checkpoint before it, or from the level's start", stacklevel=2
                )
        return None

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints of a finished level."""
        for path in (self.checkpoint, self.checkpoint_before, self._checkpoint_new):
            path.unlink(missing_ok=True)

    def save_divergence(self, what: Mapping[str, Any]) -> None:
        """Write ``diverged.json``: where the level's first training diverged, and the learning rate of its second."""
        files.write_object(self.path / "diverged.json", what)

    def load_divergence(self) -> dict[str, Any] | None:
        """Read ``diverged.json``; None if the level has not diverged."""
        path = self.path / "diverged.json"
        try:
            return untrusted.read_object(path) if path.exists() else None
        except UserError as error:
            raise Damaged(f"{error}; remove the file to train the level from its start") from error

    def finish(
        self, result: LevelResult, ticket: int, rewind: bool = False, layers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Write ``level.json``, which makes the level finished, with the checksums of its files as they are now.

        ``ticket`` is the checksum of the ticket that the level was trained from; with ``rewind``, the rewind point counts as one
        of its files. ``layers`` says how each pruned layer was computed.
        """
        names = (TICKET, POSTERIOR, HISTORY, *([REWIND] if rewind else []))
        sums = {name: files.crc32_of(self.path / name) for name in names}
        Manifest(result, ticket, sums, layers).save(self.path / MANIFEST)

    def manifest(self) -> Manifest | None:
        """Read ``level.json``; None if the level is not finished. Raises ``Damaged`` if the file is damaged or another level's."""
        found = Manifest.load(self.path / MANIFEST)
        if found is not None and self.number not in (None, found.result.level):
            raise Damaged(f"{self.path / MANIFEST} is the manifest of level {found.result.level}")
        return found

    def check(self, epochs: int) -> Manifest | None:
        """Check the files and contents of a finished level and return its manifest; None if the level is not finished.

        Raises ``Damaged`` as :meth:`check_files` and :meth:`read` do.
        """
        manifest = self.check_files()
        if manifest is not None:
            self.read(manifest.result, epochs)
            if REWIND in manifest.files:  # it may have been damaged before the manifest was written
                Posterior.load(self.path / REWIND)
        return manifest

    def check_files(self) -> Manifest | None:
        """The manifest of a finished level, or None; raises ``Damaged`` unless each file has the checksum that it gives."""
        manifest = self.manifest()
        if manifest is None:
            return None
        if not {TICKET, POSTERIOR, HISTORY} <= manifest.files.keys() <= {TICKET, POSTERIOR, HISTORY, REWIND}:
            raise Damaged(
                f"{self.path / MANIFEST} lists {', '.join(manifest.files)}; expected {TICKET}, {POSTERIOR}, {HISTORY} and "
                f"at most {REWIND}"
            )
        for name, expected in manifest.files.items():
            try:
                found = files.crc32_of(self.path / name)
            except FileNotFoundError as error:
                raise Damaged(f"{self.path / name} is missing") from error
            if found != expected:
                raise Damaged(f"{self.path / name} does not have the checksum that {MANIFEST} gives")
        return manifest

    def read(self, row: LevelResult, epochs: int) -> Contents:
        """Read a level's files.

        Raises ``Damaged`` unless they agree: the mask with the level's ``row`` of results, the posterior with the mask, and
        the history with the number of ``epochs``.
        """
        try:
            ticket, (posterior, net, moved) = self.load_ticket(), Posterior.load_with_mask(self.path / POSTERIOR)
            history = self.load_history(epochs)
        except (FileNotFoundError, UserError) as error:
            raise Damaged(str(error)) from error
        mask = ticket.mask if moved is None else moved
        kept = masks.remaining(mask), masks.total(mask)
        if kept != (row.remaining, row.total):
            raise Damaged(
                f"{self.path}'s mask keeps {kept[0]} of {kept[1]} weights, its row {row.remaining} of {row.total}"
            )
        if {n: t.shape for n, t in posterior.loc.items()} != {n: t.shape for n, t in ticket.start.loc.items()}:
            raise Damaged(f"{self.path}'s posterior has other sites than its ticket")
        if any(bool(posterior.loc[name][~own].any()) for name, own in mask.items()):
            raise Damaged(f"{self.path}'s posterior has weights that its mask prunes")
        return Contents(ticket, mask, posterior, net, history)

    def has_files(self) -> bool:
        """Whether all files of a finished level exist; :meth:`check` reads them."""
        return all((self.path / name).is_file() for name in (TICKET, POSTERIOR, HISTORY))

    def set_aside(self) -> None:
        """Move the level to ``level_NN.damaged/``, or only remove its manifest if that folder exists.

        The files are kept because another machine may be able to read them. ``diverged.json`` stays, so that the level is
        trained again with the learning rate that it had.
        """
        aside = self.path.with_name(f"{self.path.name}.damaged")
        if aside.exists():
            (self.path / MANIFEST).unlink(missing_ok=True)
            return
        self.path.rename(aside)
        if (aside / "diverged.json").exists():
            self.path.mkdir()
            (aside / "diverged.json").rename(self.path / "diverged.json")


def as_csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A table of numbers as CSV; an empty cell stands for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
