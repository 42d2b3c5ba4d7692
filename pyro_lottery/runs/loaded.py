"""Run folders as objects for reading: their results, tickets, posteriors and networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery import data, guides, masks, prediction, seeds
from pyro_lottery.data import Data
from pyro_lottery.errors import Damaged, UserError
from pyro_lottery.handlers import sparse_layers, sparsify
from pyro_lottery.model import BayesianNetwork, layers
from pyro_lottery.names import check_same
from pyro_lottery.runs.config import from_json
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.level_folder import Contents
from pyro_lottery.runs.own import Own
from pyro_lottery.threads import TURN
from pyro_lottery.types import LevelResult, Mask, Posterior, Ticket
from pyro_lottery.untrusted import foreign

if TYPE_CHECKING:
    import pandas as pd
from pyro_lottery.machine import channels_last_, resolve_device
from pyro_lottery.runs.build import Shape, build, dense_ticket, load_data, shape_of, sketch


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """The network of a finished level, ready to predict: its model, guide and mask."""

    model: BayesianNetwork
    guide: AutoGuide
    mask: Mask
    level: int
    precision: str
    sparse: str
    classes: tuple[str, ...] | None = None
    """Names of the columns of the probabilities; None if they are unknown."""
    _handlers: list[tuple[Any, Any]] = field(default_factory=list, init=False, repr=False)

    @contextmanager
    def _pruned(self) -> Iterator[None]:
        """This thread's turn under the mask, in which the places of surviving weights are found once for all predictions."""
        with TURN:
            # Taken out while it is in use, since a loader may predict with this network while a prediction reads it.
            is_kept = (
                bool(self._handlers) and not torch.is_inference_mode_enabled()
            )  # whose tensors cannot be used outside it
            pruned, sparse = self._handlers.pop() if is_kept else (sparsify({}), sparse_layers("off"))
            if not _are_equal(pruned.mask, self.mask):
                pruned, sparse = sparsify(self.mask), sparse_layers("off" if masks.is_full(self.mask) else self.sparse)
            with pruned, sparse:
                yield
            if not torch.is_inference_mode_enabled():
                self._handlers[:] = [(pruned, sparse)]

    def predict(self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0, *, aggregate: bool = True) -> Tensor:
        """Class probabilities [n, classes] of normalised images ``x``, or E[y | x] for real targets.

        On a CPU, the same seed gives the same bits every time. The run's own seed, ``eval_samples`` and test images give the
        probabilities behind ``results.csv``. ``aggregate=False`` returns those of each draw, [samples, n, classes].
        """
        with self._pruned(), self._draws(seed):
            return prediction.predict(
                self.model, self.guide, x, num_samples, precision=self.precision, aggregate=aggregate
            )

    def predictive(
        self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0
    ) -> prediction.Predictive | prediction.Mixture:
        """Probabilities and entropies for ``x`` from the draws of :meth:`predict`; for real targets, a mixture."""
        with self._pruned(), self._draws(seed):
            return prediction.predictive(self.model, self.guide, x, num_samples, precision=self.precision)

    def predictives(
        self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0
    ) -> Iterator[prediction.Predictive]:
        """Probabilities and total, aleatoric and epistemic entropy for ``x`` from the first 1, 2, ... ``num_samples`` draws.

        Threads take turns, draw by draw, and get the same bits as one after the other.
        """
        every = prediction.predictives(self.model, self.guide, x, num_samples, precision=self.precision)
        draws = self._draws(seed)
        while True:
            with self._pruned(), draws:  # around each step, so that the caller's code between steps is not masked
                predictive = next(every, None)
            if predictive is None:
                return
            yield predictive

    def _draws(self, seed: int) -> seeds.Rng:
        return seeds.Rng(next(iter(self.guide.parameters())).device, seed, "predict", self.level)

    def predict_mean(self, x: prediction.Inputs) -> Tensor:
        """Class probabilities [n, classes] for ``x``, or E[y | x], with the mean weights."""
        with self._pruned():
            return prediction.predict_mean(self.model, self.guide, x, precision=self.precision)


def _are_equal(a: Mask, b: Mask) -> bool:
    return a.keys() == b.keys() and all(torch.equal(m, b[name].to(m)) for name, m in a.items())


class Level:
    """One finished level of a run."""

    def __init__(self, number: int, run: Run, contents: Contents):
        self.number, self._run, self._contents = number, run, contents

    @property
    def ticket(self) -> Ticket:
        """The ticket that the level was trained from."""
        return self._contents.ticket

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
        self._run.vet()
        config, shape, where = self._run.config, self._run.shape, resolve_device(str(device))
        posterior, net = self.posterior, self._contents.net
        if self._run.own is None:
            self._check_shapes(sketch(config, shape), {**posterior.loc, **net})
        model, guide = build(config, shape, own=self._run.own)
        guides.set_posterior_(guide, posterior)
        model.load_net_state(net)
        model.to(where)
        guide.to(where)
        channels_last_(model)
        return TrainedNetwork(
            model, guide, self.ticket.mask, self.number, config.precision, config.sparse, self._run.classes
        )

    def _check_shapes(self, net: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Raise ``Damaged`` unless the saved values have the names and shapes of ``net``, before memory is allocated for it."""
        second = layers.second_names(net)
        expected = {name: value for name, value in net.state_dict().items() if name not in second}
        whose = f"network of --arch {self._run.config.arch}"
        check_same(saved, expected, f"{self._run.folder.level(self.number).path}: ", whose, error=Damaged)


class Run:
    """A run folder, opened for reading only."""

    def __init__(self, path: str | Path, trust_code: bool = False, own: Own | None = None):
        self.folder, self.trust_code, self.own = RunFolder(path), trust_code, own
        saved = self.folder.config
        self.config = from_json(saved)
        try:
            self.shape = Shape(**saved["data"] | {"image_size": tuple(saved["data"]["image_size"])})
            made_in_python = self.config.dataset == data.OWN
            classes = [] if made_in_python and self.shape.num_classes is None else [self.shape.num_classes]
            example = [self.shape.in_channels, *self.shape.image_size]
            if not all(type(n) is int and 0 < n < 2**31 for n in (*classes, self.shape.num_data, *example)):
                raise TypeError
            if not made_in_python and (len(example) != 3 or math.prod(example) > 3 * data.PIXELS):
                raise TypeError
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.folder.path / 'config.json'} has no valid description of the run's data") from error

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
        named = foreign(self.config.arch, self.config.guide, self.config.prior, self.config.score)
        if named and not self.trust_code:
            raise UserError(
                f"{self.folder.path / 'config.json'} names code to import, {', '.join(named)}; if you trust it, give "
                "--trust-code, or load_run(path, trust_code=True)"
            )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their labels; None if the run has none."""
        names = self.folder.config.get("classes")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
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
        remedy = f"choose among {finished}" if finished else "finish one first"
        raise UserError(f"{run.folder.path}: no finished level is chosen; {remedy}")
    return wanted


def load_run(path: str | Path, trust_code: bool = False, own: Own | None = None) -> Run:
    """Open a run folder: ``.config``, ``.results`` (a DataFrame), ``.level(k).ticket / .posterior / .load_model()``.

    No code in the folder is executed. If config.json names a network, guide, prior or score by import path, networks are built
    only with ``trust_code``. ``own`` holds the objects that a run of :func:`pyro_lottery.find_tickets` was made from. Raises
    ``UserError`` if ``path`` is not a run folder.
    """
    return Run(path, trust_code, own)
