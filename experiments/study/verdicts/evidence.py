"""The finished levels on which the claims are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.study.finished import of_guide, read
from experiments.study.protocols import protocol_of
from experiments.study.statistics import Curve
from pyro_lottery import tables
from pyro_lottery.errors import UserError

SMALL = {"resnet": ("resnet18", "resnet20"), "vgg": ("vgg11",), "vit": ("vit_tiny",)}
"""The networks of the paper's main figures by family."""
SCORES = ("snr", "magnitude", "squared_sum")
CLOSE, CALIBRATED = 1.0, 0.01
"""Points of accuracy, and of MACE, within which two curves count as the same; the paper names no margin."""
PAPER_SAMPLES = 10
"""The paper's weight samples a batch."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All finished levels (``Finished.all_levels``, with ``base``: at the protocol's own learning rate), and the layers
    of the last level of each run.
    """

    levels: pd.DataFrame
    layers: pd.DataFrame

    def curve(
        self, arch: str, guide: str = "mean_field", score: str = "snr", treatment: str = "imp", rewind: str = "init"
    ) -> Curve:
        """The curve of one kind of ticket of one network."""
        if treatment == "transplant":
            guide, score = "mean_field", "magnitude"  # of the run that the tickets come from
        return Curve(of_guide(self.levels, guide, score, arch=arch, treatment=treatment, rewind=rewind, base=True))

    def networks(self, family: str) -> list[str]:
        """The networks of a family that have runs, or the family's first."""
        found = [arch for arch in SMALL[family] if (self.levels["arch"] == arch).any()]
        return found or [SMALL[family][-1]]

    def all_networks(self) -> list[str]:
        """The networks of the paper's main figures that have runs, or one of each family."""
        found = [arch for archs in SMALL.values() for arch in archs if (self.levels["arch"] == arch).any()]
        return found or [archs[-1] for archs in SMALL.values()]


def worst(gaps: pd.DataFrame, badness: Callable[[float], float]) -> pd.Series:
    """The column of the level whose mean over seeds is worst."""
    if gaps.empty:
        return pd.Series(dtype=float)
    return gaps[max(gaps.columns, key=lambda level: badness(gaps[level].mean()))]


def gather(
    root: Path, protocol: str | None = None, data: str | None = None, accuracy: str = "test_accuracy"
) -> tuple[Evidence, list[str]]:
    """The evidence in a folder of runs, of one protocol or of all but ``custom``, and a line per protocol that says what
    it is.
    """
    runs = [run for run in tables.list_runs(root) if run.folder.results()]
    found = {protocol_of(run.config) for run in runs if data in (None, run.config.data_name)}
    names = [protocol] if protocol else sorted(found - {"custom"}) or [None]
    studies = [read(root, name, data, accuracy) for name in names]
    parts = []
    for study in studies:
        complete = {str(r.folder.path) for r in study.runs if len(r.folder.results()) == r.config.levels + 1}
        frame = study.all_levels.assign(protocol=study.protocol)
        parts.append(frame[(frame["treatment"] != "imp") | frame["run"].isin(complete)])
    levels = pd.concat(parts, ignore_index=True)
    for arch, several in levels.groupby("arch")["protocol"].unique().items():
        if len(several) > 1:
            raise UserError(f"{root} has {arch} under the protocols {', '.join(several)}; choose one with --protocol")
    lines = []
    for study in studies:
        seeds = levels[levels["protocol"] == study.protocol].groupby("arch")["seed"].nunique()
        counts = ", ".join(f"{arch} ({count} seed{'s' * (count > 1)})" for arch, count in seeds.items())
        lines.append(f"{counts}: {study.description}")
    return Evidence(levels, pd.concat([s.layers for s in studies], ignore_index=True)), lines
