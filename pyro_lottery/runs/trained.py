"""The network of a finished level, ready to predict, and how it is built again from its values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lottery import data, guides, masks, prediction, seeds
from pyro_lottery.errors import Damaged, UserError
from pyro_lottery.handlers import sparse_layers, sparsify
from pyro_lottery.machine import channels_last_, resolve_device
from pyro_lottery.model import BayesianNetwork, layers
from pyro_lottery.model.fixed import Ensemble, plain
from pyro_lottery.names import check_same
from pyro_lottery.runs.build import Shape, build, sketch
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.own import Own
from pyro_lottery.threads import TURN
from pyro_lottery.types import Mask, Ticket
from pyro_lottery.untrusted import foreign


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
    def pruned(self) -> Iterator[None]:
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
        with self.pruned(), self.draws(seed):
            return prediction.predict(
                self.model, self.guide, x, num_samples, precision=self.precision, aggregate=aggregate
            )

    def predictive(
        self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0
    ) -> prediction.Predictive | prediction.Mixture:
        """Probabilities and entropies for ``x`` from the draws of :meth:`predict`; for real targets, a mixture."""
        with self.pruned(), self.draws(seed):
            return prediction.predictive(self.model, self.guide, x, num_samples, precision=self.precision)

    def predictives(
        self, x: prediction.Inputs, num_samples: int = 10, seed: int = 0
    ) -> Iterator[prediction.Predictive]:
        """Probabilities and total, aleatoric and epistemic entropy for ``x`` from the first 1, 2, ... ``num_samples`` draws.

        Threads take turns, draw by draw, and get the same bits as one after the other.
        """
        every = prediction.predictives(self.model, self.guide, x, num_samples, precision=self.precision)
        draws = self.draws(seed)
        while True:
            with self.pruned(), draws:  # around each step, so that the caller's code between steps is not masked
                predictive = next(every, None)
            if predictive is None:
                return
            yield predictive

    def draws(self, seed: int) -> seeds.Rng:
        """The random numbers of predictions by ``seed``, as a context."""
        return seeds.Rng(next(iter(self.guide.parameters())).device, seed, "predict", self.level)

    def as_module(self, samples: int | None = None, seed: int = 0) -> nn.Module:
        """The network as a torch module without Pyro, for libraries that take one; its inputs are normalised images.

        By default it is the network that it was made from, with the mean weights as parameters, and returns logits
        [n, classes]. With ``samples``, it holds that many draws of the weights, those of :meth:`predict` by ``seed``, and returns
        logits [samples · n, classes], draw by draw, as ensembles of torch-uncertainty do. Changes do not reach this network.
        """
        with self.pruned():
            if samples is None:
                return plain(self.model.net, prediction.mean_weights(self.model, self.guide), self.mask)
            with self.draws(seed):
                draws = prediction.drawn_weights(self.model, self.guide, samples)
        return Ensemble(plain(self.model.net, weights, self.mask) for weights in draws)

    def predict_mean(self, x: prediction.Inputs) -> Tensor:
        """Class probabilities [n, classes] for ``x``, or E[y | x], with the mean weights."""
        with self.pruned():
            return prediction.predict_mean(self.model, self.guide, x, precision=self.precision)


def _are_equal(a: Mask, b: Mask) -> bool:
    return a.keys() == b.keys() and all(torch.equal(m, b[name].to(m)) for name, m in a.items())


def shape_from(saved: Mapping[str, Any], config: Config, whose: str) -> Shape:
    """The shape in the entry ``data`` of a ``config.json``; raises ``UserError`` if it is not one."""
    try:
        shape = Shape(**saved["data"] | {"image_size": tuple(saved["data"]["image_size"])})
        made_in_python = config.dataset == data.OWN
        classes = [] if made_in_python and shape.num_classes is None else [shape.num_classes]
        example = [shape.in_channels, *shape.image_size]
        if not all(type(n) is int and 0 < n < 2**31 for n in (*classes, shape.num_data, *example)):
            raise TypeError
        if not made_in_python and (len(example) != 3 or math.prod(example) > 3 * data.PIXELS):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise UserError(f"{whose} has no valid description of the run's data") from error
    return shape


def named_code(config: Config) -> list[str]:
    """The import paths of code that building the network of ``config`` imports."""
    return foreign(config.arch, config.guide, config.prior, config.score)


def check_code(config: Config, trust_code: bool, whose: str) -> None:
    """Raise ``UserError`` if building the network of ``config`` would import code that it names, unless ``trust_code``."""
    if (named := named_code(config)) and not trust_code:
        raise UserError(
            f"{whose} names code to import, {', '.join(named)}; if you trust it, give --trust-code, or load_run(path, "
            "trust_code=True)"
        )


def rebuild(
    config: Config, shape: Shape, found: Ticket, level: int, classes: tuple[str, ...] | None, *, whose: str,
    own: Own | None = None, device: torch.device | str = "cpu",
) -> TrainedNetwork:  # fmt: skip
    """The network of ``config`` with the posterior, mask and other tensors of ``found``, bit for bit.

    Raises ``Damaged``, naming ``whose`` they are, if the values do not fit the network.
    """
    where = resolve_device(str(device))
    if own is None:
        _check_shapes(sketch(config, shape), {**found.start.loc, **found.net}, f"{whose}: ", config.arch)
    model, guide = build(config, shape, own=own)
    guides.set_posterior_(guide, found.start)
    model.load_net_state(found.net)
    model.to(where)
    guide.to(where)
    channels_last_(model)
    return TrainedNetwork(model, guide, found.mask, level, config.precision, config.sparse, classes)


def _check_shapes(net: nn.Module, saved: Mapping[str, Tensor], where: str, arch: str) -> None:
    """Raise ``Damaged`` unless the saved values have the names and shapes of ``net``, before memory is allocated for it."""
    second = layers.second_names(net)
    expected = {name: value for name, value in net.state_dict().items() if name not in second}
    check_same(saved, expected, where, f"network of --arch {arch}", error=Damaged)
