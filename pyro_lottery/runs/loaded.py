"""Run folders as objects for reading: their results, tickets, posteriors and networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_lottery import data, seeds
from pyro_lottery.data import Data
from pyro_lottery.errors import UserError
from pyro_lottery.machine import resolve_device
from pyro_lottery.names import can_be_shown
from pyro_lottery.runs import exporting
from pyro_lottery.runs.build import build, code_facts, dense_ticket, load_data, shape_of
from pyro_lottery.runs.config import from_json
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.level_folder import Contents
from pyro_lottery.runs.own import Own
from pyro_lottery.runs.resume import check_unchanged
from pyro_lottery.runs.trained import TrainedNetwork, check_code, rebuild, shape_from
from pyro_lottery.threads import TURN
from pyro_lottery.types import LevelResult, Mask, Posterior, Ticket

if TYPE_CHECKING:
    import pandas as pd


class Level:
    """One finished level of a run."""

    def __init__(self, number: int, run: Run, contents: Contents):
        self.number, self.run, self._contents = number, run, contents

    @property
    def ticket(self) -> Ticket:
        """The ticket that the level was trained from."""
        return self._contents.ticket

    @property
    def mask(self) -> Mask:
        """The mask of the trained network: that of the ticket, unless ``--schedule`` moved it while the level trained."""
        return self._contents.mask

    @property
    def posterior(self) -> Posterior:
        """The posterior after training: ``.loc[site]``, ``.scale[site]``."""
        return self._contents.posterior

    @property
    def history(self) -> pd.DataFrame:
        """The level's ``history.csv``, one row per epoch."""
        import pandas as pd

        return pd.DataFrame(self._contents.history)

    def load_model(self, device: torch.device | str = "cpu") -> TrainedNetwork:
        """The trained network, bit for bit as saved.

        Raises ``UserError`` as :meth:`Run.vet` does, and ``Damaged`` if the saved values do not fit the network.
        """
        self.run.vet()
        run, read = self.run, self._contents
        run.check_code()
        return rebuild(
            run.config, run.shape, Ticket(read.mask, read.posterior, read.net), self.number, run.classes,
            whose=str(run.folder.level(self.number).path), own=run.own, device=device,
        )  # fmt: skip

    def export(
        self, folder: str | Path, form: str | None = None, format: str = "onnx", **options: Any
    ) -> exporting.Exported:
        """Write the trained network as a file that runs elsewhere: see :func:`pyro_lottery.runs.exporting.export`."""
        return exporting.export(self, folder, form, format, **options)


class Run:
    """A run folder, opened for reading only."""

    def __init__(self, path: str | Path, trust_code: bool = False, own: Own | None = None):
        self.folder, self.trust_code, self.own = RunFolder(path), trust_code, own
        saved = self.folder.config
        self._has_its_code = False
        self.config = from_json(saved)
        self.shape = shape_from(saved, self.config, f"{self.folder.path / 'config.json'}")

    def vet(self) -> None:
        """Raise ``UserError`` if the run's network cannot be built, or must not be.

        It must not be if that would import code that config.json names, unless the run was loaded with ``trust_code``: a run
        folder from somebody else must not run its code here. It cannot be if the run was made from objects in Python.
        """
        if self.config.dataset == data.OWN and self.own is None:
            raise UserError(
                f"{self.folder.path} was made in Python from a network and data that are in no file; call pl.find_tickets with "
                "them again, which returns the run and does not train finished levels again"
            )
        check_code(self.config, self.trust_code, str(self.folder.path / "config.json"))

    def check_code(self) -> None:
        """Raise ``UserError`` if the user's code that config.json names is not what it was when the run was started."""
        saved = self.folder.config
        if "code" in saved and self.own is None and not self._has_its_code:
            check_unchanged(str(self.folder.path), saved, code_facts(self.config, self.shape))
            self._has_its_code = True

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their labels; None if the run has none."""
        names = self.folder.config.get("classes")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) and can_be_shown(name) for name in names):
            raise UserError(f"{self.folder.path / 'config.json'}: classes is {names!r}; expected a list of names")
        if len(names) != self.shape.num_classes:
            raise UserError(
                f"{self.folder.path / 'config.json'}: classes has {len(names)} names; expected {self.shape.num_classes}"
            )
        return tuple(names)

    @property
    def results(self) -> pd.DataFrame:
        """One row per finished level, with the columns of ``results.csv``; read anew at each access."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(row) for row in self.folder.results()], columns=[f.name for f in fields(LevelResult)]
        )

    def level(self, number: int) -> Level:
        """Level ``number``, read from its files; raises as :meth:`row`."""
        return Level(number, self, self._read(number)[1])

    def row(self, number: int) -> LevelResult:
        """A finished level's row of ``results.csv``.

        Raises ``UserError`` if the level is not finished, and ``Damaged`` if its files are damaged or do not agree.
        """
        return self._read(number)[0]

    def _read(self, number: int) -> tuple[LevelResult, Contents]:
        rows = {row.level: row for row in self.folder.results()}
        if number not in rows:
            raise UserError(f"{self.folder.path} has no finished level {number}; finished: {list(rows)}")
        folder = self.folder.level(number)
        folder.check_files()  # in a folder of version 0.1.0, levels have no checksums
        return rows[number], folder.read(rows[number], self.config.epochs_of(number))

    def initial(self, seed: int) -> Ticket:
        """The dense ticket of the run's network at the random initial values of ``seed``, even if the run used ``--pretrained``."""
        self.vet()
        config = replace(self.config, seed=seed)
        if self.own is None:
            return dense_ticket(*build(config, self.shape))
        with TURN, seeds.rng("cpu", seed, "init"):
            own = self.own.drawn_anew()
        return dense_ticket(*build(config, self.shape, own=own))

    def load_data(self, device: torch.device | str = "cpu", data_dir: str | Path | None = None) -> Data:
        """The run's data set, from ``data_dir`` if it has moved; raises ``UserError`` if the folder has other images.

        Without ``data_dir``, nothing is written to or downloaded into the data folder, because the run's author chose its path.
        """
        if self.own is not None:
            return self.own.data.to(resolve_device(str(device)))
        config = self.config if data_dir is None else replace(self.config, data_dir=str(data_dir))
        found = load_data(config, resolve_device(str(device)), write=data_dir is not None)
        self.check_data(found)
        return found

    def check_data(self, found: Data) -> None:
        """Raise ``UserError`` unless the run was trained on the data ``found``."""
        if shape_of(found) != self.shape:
            raise UserError(
                f"--data-dir has other data than {self.folder.path} was trained on; give the folder of the run's data"
            )


def check_levels(run: Run, levels: Iterable[int] | None, lowest: int = 0) -> list[int]:
    """``levels`` in order, by default all finished levels from ``lowest`` on; raises ``UserError`` if one is not finished."""
    finished = [row.level for row in run.folder.results() if row.level >= lowest]
    wanted = finished if levels is None else sorted(set(levels))
    for level in wanted:
        if level not in finished:
            raise UserError(f"--levels {level}: not a finished level of {run.folder.path}; choose among {finished}")
    if not wanted:
        remedy = f"choose among {finished}" if finished else f"finish level {lowest} first"
        raise UserError(f"{run.folder.path}: no finished level is chosen; {remedy}")
    return wanted


def load_run(path: str | Path, trust_code: bool = False, own: Own | None = None) -> Run:
    """Open a run folder: ``.config``, ``.results`` (a DataFrame), ``.level(k).ticket / .posterior / .load_model()``.

    No code in the folder is executed. If config.json names a network, guide, prior or score by import path, networks are built
    only with ``trust_code``. ``own`` holds the objects that a run of :func:`pyro_lottery.find_tickets` was made from. Raises
    ``UserError`` if ``path`` is not a run folder.
    """
    return Run(path, trust_code, own)
