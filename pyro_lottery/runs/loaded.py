"""Finished runs as objects: from a run folder to its results and networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery import data, guides, prediction, seeds
from pyro_lottery.data import Data
from pyro_lottery.errors import Damaged, UserError
from pyro_lottery.handlers import sparsify
from pyro_lottery.model import BayesianNetwork, layers
from pyro_lottery.names import check_same
from pyro_lottery.runs.config import from_json
from pyro_lottery.runs.folder import RunFolder
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
    """A network of a finished level, ready to predict: model, guide and mask belong together."""

    model: BayesianNetwork
    guide: AutoGuide
    mask: Mask
    level: int
    precision: str
    classes: tuple[str, ...] | None = None
    """Names of the columns of the probabilities, where they are known."""

    def predict(self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0, *, aggregate: bool = True) -> Tensor:
        """Class probabilities [n, classes] of normalised images ``x``, or E[y | x]; one seed gives the same bits every time
        (CPU).

        With the run's own seed, ``eval_samples`` and test images they are those that ``results.csv`` was measured on. With
        ``aggregate=False`` those of every draw, [samples, n, classes].
        """
        with TURN, sparsify(self.mask), self._draws(seed):
            return prediction.predict(
                self.model, self.guide, x, num_samples, precision=self.precision, aggregate=aggregate
            )

    def predictive(
        self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0
    ) -> prediction.Predictive | prediction.Mixture:
        """What the draws of :meth:`predict` say of ``x``: probabilities and entropies, or of real targets a mixture."""
        with TURN, sparsify(self.mask), self._draws(seed):
            return prediction.predictive(self.model, self.guide, x, num_samples, precision=self.precision)

    def predictives(
        self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0
    ) -> Iterator[prediction.Predictive]:
        """What 1, 2, ... ``num_samples`` draws say of ``x``: probabilities, total, aleatoric and epistemic entropy.

        Threads take turns, draw by draw, and get the bits that they would get one after the other.
        """
        every = prediction.predictives(self.model, self.guide, x, num_samples, precision=self.precision)
        pruned, draws = sparsify(self.mask), self._draws(seed)
        while True:
            with TURN, pruned, draws:  # around each step: what the caller does in between is not masked
                predictive = next(every, None)
            if predictive is None:
                return
            yield predictive

    def _draws(self, seed: int) -> seeds.Stream:
        return seeds.Stream(next(iter(self.guide.parameters())).device, seed, "predict", self.level)

    def predict_mean(self, x: prediction.Inputs) -> Tensor:
        """Class probabilities [n, classes], or E[y | x], of the mean weights."""
        with TURN, sparsify(self.mask):
            return prediction.predict_mean(self.model, self.guide, x, precision=self.precision)


class Level:
    """One finished level of a run."""

    def __init__(self, number: int, run: Run):
        self.number, self._run, self._folder = number, run, run.folder.level(number)

    @cached_property
    def ticket(self) -> Ticket:
        """What the level started from."""
        return self._folder.load_ticket()

    @cached_property
    def posterior(self) -> Posterior:
        """What it trained to: ``.loc[site]``, ``.scale[site]``."""
        return self._folder.load_posterior()[0]

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per epoch."""
        import pandas as pd

        return pd.DataFrame(self._folder.load_history(self._run.config.epochs_of(self.number)))

    def load_model(self, device: torch.device | str = "cpu") -> TrainedNetwork:
        """The trained network, with the bits it had when it was saved."""
        self._run.vet()
        self._run.row(self.number)
        config, shape, ticket = self._run.config, self._run.shape, self.ticket
        (posterior, net), where = self._folder.load_posterior(), resolve_device(str(device))
        if self._run.own is None:
            self._check_shapes(sketch(config, shape), {**posterior.loc, **net})
        model, guide = build(config, shape, where, own=self._run.own)
        guides.set_posterior_(guide, posterior)
        model.load_net_state(net)
        channels_last_(model)
        return TrainedNetwork(model, guide, ticket.mask, self.number, config.precision, self._run.classes)

    def _check_shapes(self, net: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Raise ``Damaged`` unless the level's values are those of ``net``, before memory for it is needed."""
        second = layers.second_names(net)
        expected = {name: value for name, value in net.state_dict().items() if name not in second}
        whose = f"network of --arch {self._run.config.arch}"
        check_same(saved, expected, f"{self._folder.path}: ", whose, error=Damaged)


class Run:
    """A run folder, read only."""

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
            raise UserError(f"{self.folder.path / 'config.json'} does not describe its data") from error

    def vet(self) -> None:
        """Raise ``UserError`` where building the run's network would import code that its config.json names, unless
        the run was loaded with ``trust_code``: whoever sends a run folder shall not run code here. Also where it was made
        of objects that are not in any file.
        """
        if self.config.dataset == data.OWN and self.own is None:
            raise UserError(
                f"{self.folder.path} was made in Python from a network and data that are in no file; call pl.find_tickets with them "
                "again, which trains nothing that is finished and returns the whole run"
            )
        named = foreign(self.config.arch, self.config.guide, self.config.prior, self.config.score)
        if named and not self.trust_code:
            raise UserError(
                f"{self.folder.path / 'config.json'} names code to import, {', '.join(named)}; if you trust it, say "
                "--trust-code, or load_run(path, trust_code=True)"
            )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their labels; None where the run does not know them."""
        names = self.folder.config.get("classes")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
            raise UserError(f"{self.folder.path / 'config.json'}: classes is {names!r}; expected a list of names")
        if len(names) != self.shape.num_classes:
            raise UserError(
                f"{self.folder.path / 'config.json'} names {len(names)} classes of {self.shape.num_classes}"
            )
        return tuple(names)

    @property
    def results(self) -> pd.DataFrame:
        """One row per level that is finished now, as in ``results.csv``."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(row) for row in self.folder.results()], columns=[f.name for f in fields(LevelResult)]
        )

    def level(self, number: int) -> Level:
        """A finished level; ``UserError`` if it is not."""
        self.row(number)
        return Level(number, self)

    def row(self, number: int) -> LevelResult:
        """The row of a finished level in ``results.csv``; ``UserError`` if it is not, ``Damaged`` if its files do not agree."""
        rows = {row.level: row for row in self.folder.results()}
        if number not in rows:
            raise UserError(f"{self.folder.path} has no finished level {number}; finished: {list(rows)}")
        folder, epochs = self.folder.level(number), self.config.epochs_of(number)
        if folder.check(epochs) is None:  # of version 0.1.0, without manifests
            folder.check_content(rows[number], epochs)
        return rows[number]

    def initial(self, seed: int) -> Ticket:
        """All weights of the run's network at the initial values that ``seed`` draws, also of a run from ``--pretrained``."""
        self.vet()
        config, cpu = replace(self.config, seed=seed), torch.device("cpu")
        if self.own is None:
            return dense_ticket(*build(config, self.shape, cpu))
        with TURN, seeds.stream("cpu", seed, "init"):
            own = self.own.drawn_anew()
        return dense_ticket(*build(config, self.shape, cpu, own=own))

    def load_data(self, device: torch.device | str = "cpu", data_dir: str | Path | None = None) -> Data:
        """The run's data set, from ``data_dir`` where it lies elsewhere now; ``UserError`` if it holds other images.

        Whoever sent the run chose the folder that it names: there nothing is written, and nothing downloaded into it.
        """
        if self.own is not None:
            return self.own.data.to(resolve_device(str(device)))
        config = self.config if data_dir is None else replace(self.config, data_dir=str(data_dir))
        found = load_data(config, resolve_device(str(device)), write=data_dir is not None)
        self.check_data(found)
        return found

    def check_data(self, found: Data) -> None:
        """Raise ``UserError`` unless these are the images that the run was trained on."""
        if shape_of(found) != self.shape:
            raise UserError(
                f"--data-dir holds other images than {self.folder.path} was trained on; name the folder of its own"
            )


def check_levels(run: Run, levels: Iterable[int] | None, lowest: int = 0) -> list[int]:
    """``levels`` in order, or by default all finished ones from ``lowest``; ``UserError`` for one that is not finished."""
    finished = [row.level for row in run.folder.results() if row.level >= lowest]
    wanted = finished if levels is None else sorted(set(levels))
    for level in wanted:
        if level not in finished:
            raise UserError(f"--levels {level}: {run.folder.path} has no such finished level; choose among {finished}")
    if not wanted:
        what = f"one of {finished}" if finished else "a finished level, of which it has none yet"
        raise UserError(f"{run.folder.path}: choose {what}")
    return wanted


def load_run(path: str | Path, trust_code: bool = False, own: Own | None = None) -> Run:
    """Open a run folder: ``.config``, ``.results`` (a DataFrame), ``.level(k).ticket / .posterior / .load_model()``.

    Nothing in the folder is run. A network whose config.json names a guide or prior of the user's own by import path is
    built only with ``trust_code``. ``own`` holds the objects that a run of :func:`pyro_lottery.find_tickets` was made from.
    """
    return Run(path, trust_code, own)
