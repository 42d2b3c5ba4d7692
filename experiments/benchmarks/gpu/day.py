"""What all sections of the day share."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_lottery as pl
from experiments.benchmarks import tape
from experiments.benchmarks.launches import NARROW
from experiments.benchmarks.timing import Step, wait
from pyro_lottery.machine import channels_last
from pyro_lottery.training import graph

ESTIMATORS = ("point", "weights", "local")
ARCHS = ("resnet20", "resnet18", "vgg11", "vit_tiny")
PRECISIONS = ("32", "tf32", "bf16")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    kind: str
    """PASS, FAIL or INFO."""
    name: str
    found: str
    expected: str = ""

    def __str__(self) -> str:
        wanted = f" (expected {self.expected})" if self.expected else ""
        return f"{self.kind:4s} {self.name}: {self.found}{wanted}"


Checks = Iterator[Check]


def held(name: str, holds: bool, found: object = "", expected: object = "") -> Check:
    """A check that passes or fails."""
    return Check("PASS" if holds else "FAIL", name, str(found), str(expected))


def info(name: str, found: object, expected: object = "") -> Check:
    """A measured value, with what was expected of it."""
    return Check("INFO", name, str(found), str(expected))


def said(error: BaseException) -> str:
    """An error, short."""
    return f"{type(error).__name__}: {error}"[:200]


class Day:
    """The device, the networks and the sizes of all sections; a dry day is one on the CPU with narrow networks."""

    def __init__(
        self,
        dry: bool,
        out: Path,
        data_dir: str | None = None,
        archs: Sequence[str] | None = None,
        precisions: Sequence[str] | None = None,
    ):
        self.dry, self.out, self.data_dir = dry, out, data_dir
        self.device = torch.device("cpu" if dry else "cuda")
        self.batch, self.size, self.path = (4, 8, "torch") if dry else (128, 32, "auto")
        self.archs = tuple(archs or (("resnet20",) if dry else ARCHS))
        self.precisions = tuple(precisions or (("32",) if dry else PRECISIONS))
        self.rounds, self.inner = (2, 2) if dry else (7, 20)
        self.record = tape.record if dry else graph.cuda_graph
        """What records a step."""

    def net(self, arch: str) -> nn.Module:
        """A network for images of this day's size."""
        return NARROW[arch]() if self.dry else pl.create_model(arch, num_classes=10)

    def network(self, arch: str, estimator: str, num_data: int = 50_000) -> tuple[pl.BayesianClassifier, Any]:
        """A Bayesian network and its guide, the same at each call, on the CPU."""
        torch.manual_seed(0)
        point = estimator == "point"
        model = pl.BayesianClassifier(self.net(arch), pl.priors.flat() if point else None, num_data=num_data)
        return model, (pl.guides.deterministic if point else pl.guides.mean_field)(model)

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """Random images and labels."""
        x = channels_last(torch.randn(count, 3, self.size, self.size)).to(self.device)
        return x, torch.randint(0, 10, (count,)).to(self.device)

    def ms(self, step: Step, inner: int | None = None) -> float:
        """Milliseconds of a step: the median of several rounds, each of which waits for the GPU at its end alone."""
        found, inner = [], inner or self.inner
        for turn in range(self.rounds + 1):
            wait(self.device)
            began = time.perf_counter()
            for _ in range(inner):
                step()
            wait(self.device)
            found += [1000 * (time.perf_counter() - began) / inner] if turn else []
        return statistics.median(found)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command of the library."""
        line = [sys.executable, "-m", f"pyro_lottery.{arguments[0]}", *arguments[1:], "--device", self.device.type]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
