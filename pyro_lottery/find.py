"""``find_tickets``: iterative magnitude pruning of any network on any data, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from pyro_lottery import files, guides
from pyro_lottery.data import OWN, Data
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.priors import AnyPrior
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.loaded import Run
from pyro_lottery.runs.own import Likelihood, Own, name_of
from pyro_lottery.scores import Score

_OF_NAMED_DATA = {
    "arch", "patch_size", "dataset", "data_dir", "train_size", "test_size", "val_fraction", "augment", "run_dir", "prior", "guide",
    "score", "image_size", "pretrained", "pretrained_key", "level0_from",
}  # fmt: skip
OPTIONS = tuple(f.name for f in fields(Config) if f.name not in _OF_NAMED_DATA)
"""Options of the command line that ``find_tickets`` accepts, with underscores instead of hyphens."""


def find_tickets(
    network: nn.Module,
    data: Data,
    *,
    likelihood: Likelihood | None = None,
    prior: AnyPrior | str = "normal",
    guide: Callable[..., Any] | str = "mean_field",
    score: Score | str = "snr",
    run_dir: str | Path | None = None,
    **options: Any,
) -> Run:
    """Prune ``network`` on ``data`` by iterative magnitude pruning (paper §5); returns the run, like ``pl.load_run``.

    ``network`` is a plain module. Its values are the initial values, and it does not change. ``data`` comes from
    ``pl.data.from_tensors`` or ``pl.data.from_loaders``. ``likelihood`` is a class such as ``pl.BayesianClassifier``, a
    ``functools.partial`` of one, or a function ``(net, prior, num_data=, kl_temperature=) -> model``. The default is
    ``pl.BayesianClassifier`` for class targets, and ``pl.BayesianRegressor`` with learned noise for real targets, [n, channels, ...] with a scale for each channel.

    ``prior``, ``guide`` and ``score`` are names as on the command line, or objects: a prior, a Pyro AutoGuide class or a
    function ``model -> guide``, a function ``posterior -> sites``. ``options`` are options of
    ``python -m pyro_lottery.imp``: ``levels``, ``prune_fraction``, ``epochs``, ``batch_size``, ``lr``, ``milestones``,
    ``kl_temperature``, ``seed``, ...

    By default, the run folder is in ``runs/``, and its name holds the options and a checksum of network and data. The same
    call resumes the folder, and returns at once if all levels are finished. Raises ``UserError`` before the first step if
    the network, data or options cannot be trained, or if ``run_dir`` was started with other values, data or options.
    """
    # Imported here: if the package imported the command imp, ``python -m pyro_lottery.imp`` would warn.
    from pyro_lottery.imp import run_imp

    if not isinstance(network, nn.Module):
        raise UserError(f"network must be a torch.nn.Module, got a {type(network).__name__}")
    if not isinstance(data, Data):
        raise UserError(
            f"data must come from pl.data.from_tensors or pl.data.from_loaders, got a {type(data).__name__}"
        )
    for name in options:
        if name not in OPTIONS:
            raise unknown("option of find_tickets", name, OPTIONS)
    # This library's guides go by their names, since a deterministic run, known by its name, has no prior.
    guide = next((name for name, known in guides.NAMED.items() if guide is known), guide)
    given: dict[str, Any] = {"prior": prior, "guide": guide, "score": score}
    objects = {name: value for name, value in given.items() if not isinstance(value, str)}
    names: dict[str, Any] = {name: name_of(value) if name in objects else value for name, value in given.items()}
    own = Own(network, data, likelihood, **objects)
    config = Config(arch=name_of(network), dataset=OWN, augment=data.augment, run_dir="", **names, **options)
    path = Path("runs") / f"{config.name()}-{_checksum(own):08x}" if run_dir is None else Path(run_dir)
    return run_imp(Config(**config.options() | {"run_dir": str(path)}), own)


def _checksum(own: Own) -> int:
    state = {name: value.detach().cpu() for name, value in own.network.state_dict().items()}
    return files.checksum(state, f"{own.data.checksum} {name_of(own.likelihood or object())}")
