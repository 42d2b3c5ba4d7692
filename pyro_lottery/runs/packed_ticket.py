"""Trained networks with the interface of an exported network, and those of small ticket files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_lottery import masks, prediction, untrusted
from pyro_lottery.data import OWN, Split
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.exports.networks import outputs, summary
from pyro_lottery.exports.predictor import Predictor, checked
from pyro_lottery.faster import is_faster
from pyro_lottery.guides import is_point
from pyro_lottery.handlers import sparse_layers
from pyro_lottery.handlers.sparse_layers import measured_code
from pyro_lottery.kernels import native
from pyro_lottery.kernels.draws import Draws, NotTogether, at_once, by_draw, repeated
from pyro_lottery.machine import channels_last
from pyro_lottery.model.fixed import bare, with_weights
from pyro_lottery.model.outputs import one_tensor
from pyro_lottery.model.outputs import run as run_network
from pyro_lottery.runs.build import Shape
from pyro_lottery.runs.config import from_json
from pyro_lottery.runs.own import Own
from pyro_lottery.runs.trained import TrainedNetwork, check_code, rebuild, shape_from
from pyro_lottery.types import Sites, Ticket

PACKED = "ticket.safetensors"
"""The file of a small ticket in its folder."""
BACKENDS = {"auto": "auto", "sparse": "on", "dense": "off"}
"""What ``--backend`` says about layers, and what ``--sparse`` calls it."""
SAMPLES = 2**12
"""Largest number of draws that a file may ask for by itself."""
MOST_IMAGES = 16
"""Images of a batch up to which draws in one pass are tried; larger batches fill the processor's vectors by themselves."""

_ROUNDING = 1e-4
"""Largest difference, relative to the largest logit, that rounding makes between draws in one pass and one by one."""


class NetworkPredictor(Predictor):
    """A trained network with the interface of ``Predictor``; its outputs are the run's with the same samples and seed, in fp32.

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
        is_sparse = network.sparse != "off" and not masks.is_full(network.mask)
        handler = sparse_layers(network.sparse if is_sparse else "off")
        together = _Together(net, draws) if is_sparse and count > 1 and native.problem() is None else None

        def apart(x: Tensor) -> Tensor:
            logits = []
            with handler:
                for weights in draws:
                    with with_weights(net, weights):
                        logits.append(one_tensor(run_network(net, x)))
            return torch.stack(logits)

        def run(images: np.ndarray) -> list[np.ndarray]:
            with torch.no_grad():
                x = channels_last(pixels.normalize(torch.from_numpy(np.ascontiguousarray(images))))
                logits = together(x) if together is not None and together.is_faster(apart, x) else apart(x)
                return [value.numpy() for value in summary(torch.stack([model.expected(each) for each in logits]))]

        self._run = run


class _Together:
    """A network's logits [draws, n, classes] with all draws in one pass, where its code allows this."""

    def __init__(self, net: nn.Module, draws: Sequence[Sites]):
        self.net, self.count, self.handler = net, len(draws), sparse_layers("on")
        self.parts: list[tuple[int, dict[str, Tensor]]] | None = None
        kept = {name: int((value != 0).sum()) for name, value in draws[0].items()}
        self.what = f"{self.count} draws of {kept}, code {measured_code()}"
        self._draws: Sequence[Sites] = draws
        self._right: dict[torch.Size, bool] = {}
        """Shapes of images for which one pass was compared with the draws one by one."""

    def is_faster(self, other: Callable[[Tensor], Tensor], x: Tensor) -> bool:
        """Whether one pass for images ``x`` takes less time than ``other``, which is measured for small batches."""
        if not 0 < len(x) <= MOST_IMAGES or self._is_refused(x) or not self._is_right(other, x.shape):
            return False
        return is_faster(lambda: lambda: self(x), lambda: lambda: other(x), f"{tuple(x.shape)}, {self.what}")

    def _is_refused(self, x: Tensor) -> bool:
        if self.parts is not None:
            return not self.parts
        step = at_once()
        try:
            self.parts = [
                (len(some), {name: Draws([draw[name] for draw in some]) for name in some[0]})
                for some in (self._draws[i : i + step] for i in range(0, self.count, step))
            ]
            self(x)
        except NotTogether:
            self.parts = []
        self._draws = ()
        return not self.parts

    def _is_right(self, other: Callable[[Tensor], Tensor], shape: torch.Size) -> bool:
        """Whether one pass gives the logits of ``other`` for images of this shape, but for rounding.

        A network that moves the batch, for example by taking patches for images, mixes the draws up, which no layer can see.
        """
        if shape not in self._right:
            x = channels_last(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32))
            found, wanted = self(x), other(x)
            alike = found.shape == wanted.shape
            self._right[shape] = alike and bool((found - wanted).abs().amax() <= _ROUNDING * wanted.abs().amax())
        return self._right[shape]

    def __call__(self, x: Tensor) -> Tensor:
        """The logits of images ``x`` [n, c, h, w]."""
        found = []
        for count, weights in self.parts or ():
            with self.handler, with_weights(self.net, weights):
                found.append(by_draw(one_tensor(run_network(self.net, repeated(x))), count))
        return torch.cat(found)


def open_packed(
    path: Path, samples: int | None = None, backend: str = "auto", trust_code: bool = False, own: Own | None = None
) -> NetworkPredictor:
    """A predictor for a file of ``Ticket.pack`` that an export wrote, whose network is built again from its facts.

    ``own`` holds the objects that a network was made from in Python, which a file cannot. Raises ``Damaged`` if the file is
    damaged, and ``UserError`` if its network cannot be built, or names code to import without ``trust_code``.
    """
    ticket, info = Ticket.load(path), untrusted.load_tensors(path)[1]
    facts = info.get("facts")
    if not isinstance(facts, dict) or not isinstance(info.get("config"), dict):
        raise UserError(f"{path} does not say which network it belongs to; use it with pl.Ticket.load")
    try:
        config = from_json(info["config"])
    except UserError as error:
        raise UserError(f"{path}: the options of its run are not valid ({str(error).partition(';')[0]})") from error
    shape = shape_from(info, config, str(path))
    if config.dataset == OWN and own is None:
        raise UserError(f"{path} belongs to a network that was made in Python; use it with pl.Ticket.load")
    if ticket.start.scale is None:
        config = replace(config, guide="deterministic")
        own = None if own is None else replace(own, guide=None)
    check_code(config, trust_code, str(path))
    found = _Facts.read(facts, shape, path)
    network = rebuild(
        replace(config, sparse=BACKENDS[backend]), shape, ticket, found.level, found.classes, whose=str(path), own=own
    )
    images = torch.zeros(0, shape.in_channels, *shape.image_size, dtype=torch.uint8)
    pixels = Split(images, torch.zeros(0, dtype=torch.int64), found.mean, found.std)
    return NetworkPredictor(network, pixels, found.classes, samples or found.samples, found.seed, found.resize)


@dataclass(frozen=True)
class _Facts:
    """What a ticket file says of its network beside the options of its run."""

    level: int
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    samples: int
    seed: int
    resize: bool

    @classmethod
    def read(cls, facts: Mapping[str, Any], shape: Shape, path: Path) -> _Facts:
        """The facts in ``path``; raises ``Damaged`` unless they are valid and agree with the run's ``shape``."""
        try:
            checked(facts, path)
            counts = [facts["level"], facts.get("samples", 1), facts.get("seed", 0)]
            statistics = [facts["mean"], facts["std"]]
            if not all(type(n) is int for n in counts) or not (counts[0] >= 0 and 1 <= counts[1] <= SAMPLES):
                raise ValueError(f"level, samples and seed are {counts}")
            if not all(len(each) == shape.in_channels and {*map(type, each)} == {float} for each in statistics):
                raise ValueError("mean and std are not numbers of each channel")
            mean, std = (torch.tensor(each, dtype=torch.float32) for each in statistics)
            if not bool((mean.isfinite() & std.isfinite() & (std > 0)).all()):
                raise ValueError("mean and std are not finite, std above 0")
            if (
                facts["image_shape"] != [shape.in_channels, *shape.image_size]
                or len(facts["classes"]) != shape.num_classes
            ):
                raise ValueError("they are of another network than its options")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Damaged(f"{path}: its facts are not valid ({one_line(error)})") from error
        level, samples, seed = counts
        return cls(level, tuple(facts["classes"]), mean, std, samples, seed, facts["resize"])
