"""Runs as objects: from a config to data, model and guide; from a run folder to its results and networks."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lottery import data, guides, nets, prediction, priors, scores, seeds
from pyro_lottery.config import Config, from_json
from pyro_lottery.data import Data
from pyro_lottery.errors import UserError
from pyro_lottery.handlers import sparsify
from pyro_lottery.model import BayesianClassifier
from pyro_lottery.results import LevelFolder, RunFolder
from pyro_lottery.types import Mask, Posterior, Ticket

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Shape:
    """What a network must know of its data."""

    num_classes: int
    in_channels: int
    image_size: int
    num_data: int


def shape_of(dataset: Data) -> Shape:
    """The shape of a data set."""
    return Shape(dataset.num_classes, dataset.in_channels, dataset.image_size, len(dataset.train))


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one; a device that is not there raises ``UserError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here; use auto, cpu, cuda or cuda:N") from error
    return device


def check_names(config: Config) -> None:
    """Raise a one-line ``UserError`` for an unknown arch, score, prior or guide, before anything slow or written."""
    nets.check_name(config.arch)
    scores.by_name(config.score)
    priors.by_name(config.prior, config.prior_scale)
    guides.check_name(config.guide)


def load_data(config: Config, device: torch.device) -> Data:
    """The data set of a config, on ``device``."""
    return data.load(
        config.dataset,
        config.data_dir,
        device=device,
        train_size=config.train_size,
        val_fraction=config.val_fraction,
        augment=config.augment,
        seed=config.seed,
    )


def build(config: Config, shape: Shape, device: torch.device) -> tuple[BayesianClassifier, AutoGuide]:
    """Model and guide of a config at their initial values, which follow ``config.seed``."""
    with seeds.stream("cpu", config.seed, "init"):
        net = nets.create_model(config.arch, shape.num_classes, shape.in_channels, shape.image_size, config.patch_size)
        point = config.guide == "deterministic"
        prior = priors.flat() if point else priors.by_name(config.prior, config.prior_scale)
        model = BayesianClassifier(net, prior, num_data=shape.num_data, kl_temperature=config.kl_temperature)
        model.to(device)
        return model, guides.by_name(config.guide, model, config.init_scale)


def facts(config: Config, shape: Shape, device: torch.device) -> dict[str, Any]:
    """What ``config.json`` records beside the options: data, versions and hardware."""
    versions = {name: metadata.version(name) for name in ("torch", "pyro-ppl", "pyro-lottery")}
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "data": asdict(shape),
        "versions": versions | {"python": platform.python_version()},
        "hardware": {"device": device.type, "name": hardware, "threads": torch.get_num_threads()},
    }


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network of a finished level, ready to predict: model, guide and mask belong together."""

    model: BayesianClassifier
    guide: AutoGuide
    mask: Mask
    precision: str

    def predict(self, images: prediction.Images, num_samples: int = 10, seed: int = 0) -> Tensor:
        """Class probabilities [n, classes] of normalised ``images``; one seed gives the same bits every time (CPU)."""
        device = next(iter(self.guide.parameters())).device
        with sparsify(self.mask), seeds.stream(device, seed, "predict"):
            return prediction.predict(self.model, self.guide, images, num_samples, precision=self.precision)

    def predict_mean(self, images: prediction.Images) -> Tensor:
        """Class probabilities [n, classes] of the mean weights."""
        with sparsify(self.mask):
            return prediction.predict_mean(self.model, self.guide, images, precision=self.precision)


class Level:
    """One finished level of a run."""

    def __init__(self, folder: LevelFolder, config: Config, shape: Shape):
        self._folder, self._config, self._shape = folder, config, shape

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

        return pd.DataFrame(self._folder.load_history())

    def load_model(self, device: torch.device | str = "cpu") -> TrainedNetwork:
        """The trained network: for one seed it predicts the bits it predicted when it was saved (CPU)."""
        model, guide = build(self._config, self._shape, torch.device(device))
        posterior, net = self._folder.load_posterior()
        guides.set_posterior_(guide, posterior)
        model.load_net_state(net)
        model.to(memory_format=torch.channels_last)
        return TrainedNetwork(model, guide, self.ticket.mask, self._config.precision)


class Run:
    """A run folder, read only."""

    def __init__(self, path: str | Path):
        self.folder = RunFolder(path)
        saved = self.folder.config
        self.config = from_json(saved)
        self.shape = Shape(**saved["data"])

    @cached_property
    def results(self) -> pd.DataFrame:
        """One row per finished level, as in ``results.csv``."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.folder.results()])

    def level(self, number: int) -> Level:
        """A finished level; ``UserError`` if it is not."""
        finished = [row.level for row in self.folder.results()]
        if number not in finished:
            raise UserError(f"{self.folder.path} has no finished level {number}; finished: {finished}")
        return Level(self.folder.level(number), self.config, self.shape)

    def load_data(self, device: torch.device | str = "cpu") -> Data:
        """The run's data set."""
        return load_data(self.config, torch.device(device))


def load_run(path: str | Path) -> Run:
    """Open a run folder: ``.config``, ``.results`` (a DataFrame), ``.level(k).ticket / .posterior / .load_model()``."""
    return Run(path)
