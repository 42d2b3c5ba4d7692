"""Trained networks with the interface of an exported network, and those of small ticket files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pyro_lottery import masks, prediction, untrusted
from pyro_lottery.data import OWN, Split
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.exports.networks import outputs, summary
from pyro_lottery.exports.predictor import Predictor
from pyro_lottery.guides import is_point
from pyro_lottery.handlers import sparse_layers
from pyro_lottery.machine import channels_last
from pyro_lottery.model.fixed import bare, with_weights
from pyro_lottery.model.outputs import one_tensor
from pyro_lottery.runs.config import from_json
from pyro_lottery.runs.trained import TrainedNetwork, check_code, rebuild, shape_from
from pyro_lottery.types import Ticket

PACKED = "ticket.safetensors"
"""The file of a small ticket in its folder."""
BACKENDS = {"auto": "auto", "sparse": "on", "dense": "off"}
"""What ``--backend`` says about layers, and what ``--sparse`` calls it."""


class NetworkPredictor(Predictor):
    """A trained network with the interface of ``Predictor``; its outputs are the run's with the same samples and seed.

    The weights are drawn once, as they are for an exported graph.
    """

    def __init__(
        self, network: TrainedNetwork, pixels: Split, classes: Sequence[str], samples: int, seed: int, resize: bool
    ):
        count, model = 1 if is_point(network.guide) else samples, network.model
        shape = list(pixels.inputs.shape[1:])
        self.facts = {"image_shape": shape, "resize": resize, "classes": list(classes), "outputs": list(outputs(count))}
        with network.pruned(), network.draws(seed):
            draws = prediction.drawn_weights(model, network.guide, count)
        net = bare(model.net, model.sites, network.mask)
        sparse = sparse_layers("off" if masks.is_full(network.mask) else network.sparse)

        def run(images: np.ndarray) -> list[np.ndarray]:
            x = channels_last(pixels.normalize(torch.from_numpy(np.ascontiguousarray(images))))
            probs = []
            with sparse, torch.no_grad():
                for weights in draws:
                    with with_weights(net, weights):
                        probs.append(model.expected(one_tensor(net(x))))
                return [value.numpy() for value in summary(torch.stack(probs))]

        self._run = run


def open_packed(
    path: Path, samples: int | None = None, backend: str = "auto", trust_code: bool = False
) -> NetworkPredictor:
    """A predictor for a file of ``Ticket.pack`` that an export wrote, whose network is built again from its facts.

    Raises ``Damaged`` if the file is damaged, and ``UserError`` if its network cannot be built, or names code to import
    without ``trust_code``.
    """
    ticket, info = Ticket.load(path), untrusted.load_tensors(path)[1]
    facts = info.get("facts")
    if not isinstance(facts, dict) or not isinstance(info.get("config"), dict):
        raise UserError(f"{path} does not say which network it belongs to; use it with pl.Ticket.load")
    config = from_json(info["config"])
    shape = shape_from(info, config, str(path))
    if config.dataset == OWN:
        raise UserError(f"{path} belongs to a network that was made in Python; use it with pl.Ticket.load")
    if ticket.start.scale is None:
        config = replace(config, guide="deterministic")
    check_code(config, trust_code, str(path))
    try:
        mean, std = (torch.tensor(facts[name], dtype=torch.float32) for name in ("mean", "std"))
        images = torch.zeros(1, *facts["image_shape"], dtype=torch.uint8)
        classes = tuple(map(str, facts["classes"]))
        level, resize, count, seed = (facts.get(name, 0) for name in ("level", "resize", "samples", "seed"))
        whole = {shape.in_channels} == {len(mean), len(std), images.shape[1]} and len(classes) == shape.num_classes
        if not (
            mean.ndim == std.ndim == 1
            and bool(mean.isfinite().all())
            and bool(std.isfinite().all() and (std > 0).all())
        ):
            raise TypeError("mean and std are not finite numbers, std above 0")
        if not whole or images.shape[2:] != shape.image_size or {type(n) for n in (level, count, seed)} != {int}:
            raise TypeError("they do not agree")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path}: its facts are not valid ({one_line(error)})") from error
    network = rebuild(replace(config, sparse=BACKENDS[backend]), shape, ticket, level, classes, whose=str(path))
    pixels = Split(images, torch.zeros(1, dtype=torch.int64), mean, std)
    return NetworkPredictor(network, pixels, classes, samples or count or 1, seed, bool(resize))
