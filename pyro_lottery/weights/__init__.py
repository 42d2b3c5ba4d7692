"""Weights of plain PyTorch networks from files: finding the state dict in a checkpoint and fitting its names to a network."""

from __future__ import annotations

from pyro_lottery.weights.containers import Weights, load
from pyro_lottery.weights.fit import fit, in_half_precision
from pyro_lottery.weights.kinds import check_folder

__all__ = ["Weights", "check_folder", "fit", "in_half_precision", "load"]
