"""Iterative magnitude pruning of one's own network on one's own data, in one call."""

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
    "score", "image_size", "pretrained", "pretrained_key",
}  # fmt: skip
OPTIONS = tuple(f.name for f in fields(Config) if f.name not in _OF_NAMED_DATA)
"""Options of the command line that :func:`find_tickets` takes, spelled with underscores."""


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
    """Iterative magnitude pruning of ``network`` on ``data`` (paper §5); returns the run, as :func:`pyro_lottery.load_run` does.

    ``network`` is a plain module; its values are the initial ones, and it stays as it is. ``data`` are made by
    ``pl.data.from_tensors`` or ``pl.data.from_loaders``. Without a ``likelihood`` (a class such as ``pl.BayesianClassifier``, a
    ``functools.partial`` of one, or a function of (net, prior, num_data=, kl_temperature=)) class targets get a
    :class:`BayesianClassifier`, and real ones a :class:`BayesianRegressor` with a noise that is learned. ``prior``, ``guide`` and
    ``score`` are names as on the command line, or objects: a prior, a Pyro AutoGuide class or ``model -> guide``, a
    ``posterior -> sites``. ``options`` are those of ``python -m pyro_lottery.imp``: ``levels``, ``prune_fraction``, ``epochs``,
    ``batch_size``, ``lr``, ``milestones``, ``kl_temperature``, ``seed``, ...

    The run folder (default: in ``runs/``, named by the options and a checksum of network and data) is resumed by the same call, which
    returns at once when all levels are finished. Raises ``UserError`` for whatever cannot be trained, before the first
    step, and for a ``run_dir`` that was begun from other values, data or options.
    """
    # Not above: with imp, which is a command too, imported by the package, Python would warn when it is run.
    from pyro_lottery.imp import run_imp

    if not isinstance(network, nn.Module):
        raise UserError(f"network must be a torch.nn.Module, got a {type(network).__name__}")
    if not isinstance(data, Data):
        raise UserError(
            f"data must be made by pl.data.from_tensors or pl.data.from_loaders, got a {type(data).__name__}"
        )
    for name in options:
        if name not in OPTIONS:
            raise unknown("option of find_tickets", name, OPTIONS)
    # A guide of this library by its name, with which a deterministic network has no prior.
    guide = next((name for name in ("mean_field", "deterministic") if guide is getattr(guides, name)), guide)
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
