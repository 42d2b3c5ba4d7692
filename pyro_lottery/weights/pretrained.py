"""Networks that start from the weights of a file instead of random ones: ``--pretrained FILE``."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_lottery import tickets, weights
from pyro_lottery.model import layers
from pyro_lottery.names import LIKELIHOOD, check_finite, check_same
from pyro_lottery.weights import Weights


def start_from_(net: nn.Module, source: Weights) -> None:
    """Copy the weights of a file into a network that is not Bayesian yet, in place.

    Zeros are ordinary values here, not pruned weights. If the file has no classifier, or one for another number of classes,
    the network's classifier keeps its initial values and a warning says so. Raises ``UserError`` that lists all other
    parameters and buffers that differ in name or shape.
    """
    second = layers.second_names(net)
    own = {name: value for name, value in net.state_dict().items() if name not in second}
    given = {
        n: t for n, t in tickets.bake_pruned(source.values).items() if not (source.own and n.startswith(LIKELIHOOD))
    }
    fitted = {name: value for name, value in weights.fit(source.path, given, own).items() if name not in second}
    head = layers.classifier_parameters(net)
    if note := _other_head(fitted, own, head):
        warnings.warn(f"{source.path} {note}; {', '.join(head)} keep their initial values", stacklevel=2)
        own = {name: value for name, value in own.items() if name not in head}
        fitted = {name: value for name, value in fitted.items() if name not in head}
    check_same(fitted, own, f"{source.path}: ")
    check_finite(fitted, own, f"{source.path}: ")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(fitted[name])


def _other_head(given: Mapping[str, Tensor], own: Mapping[str, Tensor], head: Collection[str]) -> str:
    """Return how a file's classifier differs from the network's, if it can be left out; otherwise an empty string."""
    if not any(name in given for name in head):
        return "has no classifier"
    if all(name in given and given[name].shape[1:] == own[name].shape[1:] for name in head):
        classes = {len(given[name]) for name in head if given[name].shape != own[name].shape}
        return f"has a classifier for {max(classes)} classes" if classes else ""
    return ""


def load(path: str | None, key: str | None = None) -> Weights | None:
    """Load the weights of ``--pretrained PATH``; return None without the option."""
    return weights.load(Path(path), key) if path is not None else None
