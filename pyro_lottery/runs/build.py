"""Builds data, model and guide from a config."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery import (
    data,
    guides,
    kernels,
    machine,
    masks,
    nets,
    posteriors,
    priors,
    scores,
    seeds,
    tickets,
    training,
    trees,
)
from pyro_lottery.data import Data
from pyro_lottery.distributed import ALONE, Ranks, check_alone, start
from pyro_lottery.errors import UserError
from pyro_lottery.model import BayesianClassifier, BayesianNetwork, one_tensor
from pyro_lottery.model.layers import AS_REAL
from pyro_lottery.modes import evaluating
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.own import Own, fingerprint, of_code, of_score
from pyro_lottery.threads import TURN
from pyro_lottery.types import Ticket
from pyro_lottery.untrusted import foreign
from pyro_lottery.weights import Weights, pretrained

PRETRAINED = "pretrained_checksum"
"""Fact of ``config.json``: the checksum of the ``--pretrained`` weights that the run started from."""


@dataclass(frozen=True)
class Shape:
    """The facts about the data that a network is built from."""

    num_classes: int | None
    """None for real targets."""
    in_channels: int
    image_size: tuple[int, ...]
    """Height and width in pixels; for data made in Python, all sizes after the channels or features."""
    num_data: int
    checksum: int
    """CRC-32 of all inputs and targets."""

    @property
    def classes(self) -> int:
        """Number of classes, for data that have classes."""
        assert self.num_classes is not None
        return self.num_classes

    @property
    def sides(self) -> int | tuple[int, int]:
        """The side of square images; height and width of others."""
        height, width = self.image_size
        return height if height == width else (height, width)


def shape_of(dataset: Data) -> Shape:
    """The shape of a data set."""
    channels, *size = dataset.input_shape
    return Shape(dataset.num_classes, channels, tuple(size), len(dataset.train), dataset.checksum)


def check_names(config: Config, own: Own | None = None) -> None:
    """Raise ``UserError`` for an unknown arch, score, prior or guide, before anything slow is done or anything is written.

    Names that ``own`` objects replace are not checked.
    """
    if own is None:
        if config.arch.startswith(f"{data.OWN}-"):
            raise UserError(
                f"--arch {config.arch} stands for a network made in Python; pass that network to pl.find_tickets"
            )
        nets.check_name(config.arch)
    if own is None or own.score is None:
        scores.by_name(config.score)
    if own is None or own.prior is None:
        priors.by_name(config.prior, config.prior_scale)
    if own is None or own.guide is None:
        guides.check_name(config.guide)


def load_data(config: Config, device: torch.device, write: bool = True) -> Data:
    """The data set of a config, on ``device``; with ``write=False``, nothing is written to its folder."""
    names = ("train_size", "test_size", "val_fraction", "augment", "image_size", "seed")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    return data.load(config.dataset, config.data_dir, device=device, write=write, **options)


def build(
    config: Config, shape: Shape, given: Weights | None = None, own: Own | None = None
) -> tuple[BayesianNetwork, AutoGuide]:
    """Model and guide of a config, or of ``own`` objects, at their initial values: the weights ``given``, or random ones of
    ``config.seed``. Both are on the CPU, so that a ticket's bits do not depend on the device that trains it.

    Raises ``UserError`` if the network cannot be built here, does not suit the data, or has a prior that a run cannot keep.
    """
    if own is None:
        sketch(config, shape)
    with TURN, seeds.rng("cpu", config.seed, "init"):
        point = config.guide == "deterministic"
        named = not config.prior.startswith(f"{data.OWN}-")
        prior = priors.flat() if point or not named else priors.by_name(config.prior, config.prior_scale)
        if own is not None:
            model = own.model(prior, config.kl_temperature)
        else:
            net = _named_network(config, shape, given)
            model = BayesianClassifier(net, prior, num_data=shape.num_data, kl_temperature=config.kl_temperature)
        if model.prior_parameters():  # all networks of this process would share them
            raise UserError(
                f"--prior {config.prior} has an nn.Parameter to learn, which commands do not support; call pl.train in Python"
            )
        if model.hyper_sites:
            raise UserError(
                f"--prior {config.prior} samples {model.hyper_sites[0]!r}, which run folders do not keep; call pl.train in Python"
            )
        if own is not None and own.guide is not None:
            return model, guides.made_by(own.guide, model, config.init_scale)
        return model, guides.by_name(config.guide, model, config.init_scale)


def _named_network(config: Config, shape: Shape, given: Weights | None) -> nn.Module:
    net = _create(config, shape)
    _try_out(net, config.arch, shape)
    if given is not None:
        pretrained.start_from_(net, given)
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if config.sync_batchnorm else net


def dense_ticket(model: BayesianNetwork, guide: AutoGuide) -> Ticket:
    """The ticket with all weights of an untrained network, at their initial values; on the CPU, like tickets from files."""

    def on_cpu(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in sites.items()}

    found = guides.posterior(guide)
    scale = None if found.scale is None else on_cpu(found.scale)
    start = replace(found, loc=on_cpu(found.loc), scale=scale, extra=on_cpu(found.extra))
    return tickets.rewind(masks.full(start), start, on_cpu(model.net_state()))


def _create(config: Config, shape: Shape) -> nn.Module:
    return nets.create_model(config.arch, shape.classes, shape.in_channels, shape.sides, config.patch_size)


def sketch(config: Config, shape: Shape) -> nn.Module:
    """The network on torch's meta device, which allocates no memory; raises ``UserError`` if this machine cannot hold it.

    A network by import path is built in memory, because its code may compute with the values.
    """
    if nets.is_own(config.arch):
        with TURN, seeds.rng("cpu", config.seed, "init"):  # so that the global stream does not change
            return _create(config, shape)
    with torch.device("meta"):
        net = _create(config, shape)
    needed, here = 4 * sum(p.numel() for p in net.parameters()), machine.memory()
    if needed > here:
        raise UserError(
            f"--arch {config.arch} for images of {shape.in_channels}×{shape.image_size[0]}×{shape.image_size[1]} and "
            f"{shape.num_classes} classes needs {needed / 2**30:,.1f} GiB for its weights; this machine has {here / 2**30:,.1f} GiB"
        )
    return net


def _try_out(net: nn.Module, arch: str, shape: Shape) -> None:
    size = (1, shape.in_channels, *shape.image_size)
    try:
        with evaluating(net), torch.no_grad():
            found = tuple(one_tensor(net(torch.zeros(size))).shape)
    except UserError as error:
        raise UserError(f"--arch {arch}: {error}") from error
    except Exception as error:  # a network may raise anything for images that it cannot take
        text = " ".join(str(error).split())
        raise UserError(f"--arch {arch} cannot take images of {size[1:]} (channels, height, width): {text}") from error
    if found != (1, shape.num_classes):
        raise UserError(f"--arch {arch} returns {found} for one image; expected (1, {shape.num_classes})")


def facts(config: Config, shape: Shape, device: torch.device, classes: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The facts in ``config.json``: data, names of its classes, versions, hardware, random streams and kernels."""
    by_rank = config.parallel == "samples" and config.devices * config.num_nodes > 1
    versions = {name: _version(name) for name in ("torch", "pyro-ppl", "pyro-lottery")}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor_name()
    return {
        "data": asdict(shape),
        "classes": classes,
        "versions": versions | {"python": platform.python_version()},
        "hardware": {"device": device.type, "name": hardware, "threads": torch.get_num_threads()},
        "streams": seeds.STREAMS + (", augmentation by rank" if by_rank else ""),
        "kernels": kernels.backend(torch.empty(0, dtype=torch.float32, device=device)).__name__.rpartition(".")[2],
    }


def _version(name: str) -> str:
    """The installed version of a package; this one may be on Python's path without being installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True, eq=False)
class Setup:
    """A run ready to be trained: its config, data, model, guide and dense ticket."""

    config: Config
    """``--precision auto`` is replaced by the precision that the run trains in."""
    data: Data
    model: BayesianNetwork
    guide: AutoGuide
    dense: Ticket
    """All weights at their initial values."""
    facts: dict[str, Any]
    """The facts for ``config.json``, beside the options."""
    own: Own | None = None
    """The user's objects, which ``config`` cannot name."""
    ranks: Ranks = ALONE
    """The processes that train this network together."""


def prepare(config: Config, own: Own | None = None) -> Setup:
    """Load the data and build the model and guide of ``config``, or of ``own`` objects.

    Raises ``UserError`` if the run cannot be trained on this machine.
    """
    check_names(config, own)
    device, ranks = machine.resolve_device(config.device), ALONE
    several = config.devices * config.num_nodes > 1
    if config.sync_batchnorm and (device.type != "cuda" or not several):
        raise UserError("--sync-batchnorm needs several GPUs; leave it out, and each rank normalises its own images")
    if several:
        ranks = start(device.type, config.devices, config.num_nodes, config.strategy, config.parallel)
        device = ranks.device or device
    else:
        check_alone()
    return _with_precision(ranks.every(_prepare, config, device, ranks, own))


def _prepare(config: Config, device: torch.device, ranks: Ranks, own: Own | None) -> Setup:
    given = pretrained.load(config.pretrained, config.pretrained_key)
    if given is not None:
        config = config.with_weights(f"{given.checksum():08x}")
    data = load_data(config, device) if own is None else own.data.to(device)
    shape = shape_of(data)
    model, guide = build(config, shape, given, own)
    if of_complex := [name for name, value in model.net_state().items() if value.is_complex()]:
        raise UserError(f"{of_complex[0]!r} is complex, which no file of a run can hold; {AS_REAL}")
    if data.test is None:
        raise UserError("the data have no test split, on which every level is measured; give one to from_loaders")
    dense = dense_ticket(model, guide)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if free is not None and ranks.world == 1:
        warn_of_memory(config, model, guide, data, free)
    model.to(device)
    guide.to(device)
    training.check_data(model, data)
    training.check_batches(model, data, config.batch_size, ranks)
    posteriors.check_findable(
        model, guide, data, epochs=config.epochs, late=config.first_epoch(1), batch_size=config.batch_size
    )
    if any(not bool((scale > 0).all()) for scale in (dense.start.scale or {}).values()):
        raise UserError(f"--init-scale {config.init_scale} gives scales of 0 in single precision; choose a larger one")
    known = facts(config, shape, device, data.classes)
    known |= {} if given is None else {PRETRAINED: f"{given.checksum():08x}"}
    known |= {} if own is None else {"own": fingerprint(model, data, dense, own.score)}
    if own is None:
        known |= code_facts(config, shape)
        if foreign(config.score):
            score = of_score(scores.by_name(config.score), model, data, dense)
            known["code"] = known.get("code", {}) | {"score": score}
    return Setup(config, data, model, guide, dense, known, own, ranks)


def code_facts(config: Config, shape: Shape) -> dict[str, Any]:
    """The fact ``code`` if ``config`` names the user's code: numbers by which a run recognises it, whatever its weights, else nothing."""
    if not foreign(config.arch, config.guide, config.prior):
        return {}
    model, guide = build(replace(config, pretrained=None, pretrained_key=None), shape)
    generator = seeds.generator("cpu", 0, "code")
    values = {
        site: 0.1 * torch.randn(v.shape, generator=generator) for site, v in sorted(model.initial_values().items())
    }
    x = torch.randn(2, shape.in_channels, *shape.image_size, generator=generator)
    found = of_code(model, values, x, torch.zeros(2, dtype=torch.long))
    scale = guides.posterior(guide).scale or {}
    return {"code": {**found, "log_scales": sum(float(t.double().log().sum()) for t in scale.values())}}


def warn_of_memory(config: Config, model: BayesianNetwork, guide: AutoGuide, data: Data, free: int) -> None:
    """Warn before the first step if a step in float32 needs more than the ``free`` bytes of a GPU's memory."""
    x, y = data.train.head()
    four = torch.arange(4) % len(y)  # only the shapes count
    x, y = trees.map_tensors(lambda t: t.cpu()[four], x), y.cpu()[four]
    try:
        line = training.too_large(
            lambda size: training.step_memory(model, guide, x, y, size, config.estimator), config.batch_size, free
        )
    except (UserError, RuntimeError):  # it cannot be copied, or does not suit the data, which is said elsewhere
        return
    if line is not None:
        warnings.warn(line, stacklevel=3)


def _with_precision(setup: Setup) -> Setup:
    """Replace ``--precision auto`` by the precision that the run was begun in, or else by the faster one."""
    config, ranks = setup.config, setup.ranks
    begun = ranks.first(_begun_in, config)
    found = training.precision_for_data(begun, setup.model, setup.data, config.batch_size, ranks)
    device = setup.data.train.device
    if found == "bf16" and device.type == "cpu" and not machine.has_bf16(device):
        warnings.warn(
            "this processor has no bf16 instructions: --precision bf16 is emulated, about ten times slower than --precision 32",
            stacklevel=3,
        )
    return replace(setup, config=replace(config, precision=found))


def _begun_in(config: Config) -> str:
    """The precision in the run folder's config.json if there is one and ``config`` leaves the choice, else that of ``config``."""
    folder = RunFolder(str(config.run_dir))
    if config.precision != "auto" or folder.is_new:
        return config.precision
    found = folder.config.get("precision")
    return found if found in machine.PRECISIONS else config.precision
