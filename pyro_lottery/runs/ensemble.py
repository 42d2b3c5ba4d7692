"""Networks of several levels or seeds that predict together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lottery.errors import UserError
from pyro_lottery.prediction import Inputs, Predictive
from pyro_lottery.runs.loaded import Level
from pyro_lottery.runs.trained import TrainedNetwork


@dataclass(frozen=True)
class Ensemble:
    """The mixture of the posteriors of several networks, with equal weights (Lakshminarayanan et al. 2017).

    Networks of the same level draw with the same random numbers for the same seed.
    """

    networks: Sequence[TrainedNetwork]

    def predict(self, x: Inputs, num_samples: int = 10, seed: int = 0) -> Tensor:
        """Class probabilities [n, classes] of normalised images ``x``: the mean over networks, each from ``num_samples`` draws."""
        return self.predictive(x, num_samples, seed).probs

    def predictive(self, x: Inputs, num_samples: int = 10, seed: int = 0) -> Predictive:
        """Probabilities [n, classes] and entropies [n] for ``x`` from the draws of all networks.

        Raises ``UserError`` if a network is not a classifier.
        """
        found = self._each(x, num_samples, seed)
        probs = torch.stack([one.probs for one in found]).mean(0)
        entropy = torch.stack([one.aleatoric for one in found]).mean(0)
        return Predictive(probs, entropy, sum(one.num_samples for one in found))

    def disagreement(self, x: Inputs, num_samples: int = 10, seed: int = 0) -> float:
        """The fraction of examples to which two networks give different classes, averaged over all pairs (Fort et al. 2019).

        ``x`` and the errors are those of :meth:`predictive`.
        """
        chosen = [one.probs.argmax(-1) for one in self._each(x, num_samples, seed)]
        pairs = [(a != b).double().mean() for a, b in itertools.combinations(chosen, 2)]
        return float(sum(pairs) / len(pairs)) if pairs else 0.0

    def _each(self, x: Inputs, num_samples: int, seed: int) -> list[Predictive]:
        found = [network.predictive(x, num_samples, seed) for network in self.networks]
        classifiers = [one for one in found if isinstance(one, Predictive)]
        if len(classifiers) < len(found):
            raise UserError("an ensemble's predictions need classifiers")
        if len(sizes := {one.probs.shape[1] for one in classifiers}) > 1:
            raise UserError(
                f"the networks of an ensemble have {' and '.join(map(str, sorted(sizes)))} classes; give networks of the same classes"
            )
        return classifiers


def ensemble(levels: Sequence[Level | TrainedNetwork]) -> Ensemble:
    """The ensemble of the trained networks of ``levels``, of one run or of several seeds.

    Raises ``UserError`` for none, for networks of different classes, and for runs whose data were prepared differently: one input would
    mean different images to them.
    """
    if not isinstance(levels, Sequence) or not all(isinstance(level, Level | TrainedNetwork) for level in levels):
        raise UserError(
            "an ensemble needs a list of levels, such as [run.level(3), other.level(3)], or of trained networks"
        )
    if not levels:
        raise UserError("an ensemble needs at least one level")
    runs = [level.run for level in levels if isinstance(level, Level)]
    for run in runs:
        if (run.classes, run.shape.num_classes) != (runs[0].classes, runs[0].shape.num_classes):
            raise UserError(f"{run.folder.path} has other classes than {runs[0].folder.path}")
        if run.shape.checksum != runs[0].shape.checksum:
            raise UserError(
                f"{run.folder.path} was trained on other images than {runs[0].folder.path}, so its inputs are normalised differently"
            )
    networks = [level.load_model() if isinstance(level, Level) else level for level in levels]
    if len({network.classes for network in networks if network.classes is not None}) > 1:
        raise UserError("the networks of an ensemble have other classes, or the same in another order")
    return Ensemble(networks)
