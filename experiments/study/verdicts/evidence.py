"""The finished levels on which the claims are judged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from experiments.study.finished import ACCURACIES, of_guide, read_all
from experiments.study.kept import COLUMNS, LAYER_COLUMNS, TEXTS, Tables
from experiments.study.protocols import PROTOCOLS
from experiments.study.statistics import Curve
from pyro_lottery.errors import UserError

SMALL = {"resnet": ("resnet18", "resnet20"), "vgg": ("vgg11",), "vit": ("vit_tiny",)}
"""The networks of the paper's main figures by family."""
SCORES = ("snr", "magnitude", "squared_sum")
CLOSE, MATCHING, CALIBRATED = 1.0, 0.5, 0.01
"""Margins, of which the paper names none: points of accuracy within which two curves count as equivalent, points that a matching ticket may
be below the dense network, and the MACE within which two curves count as the same."""
MADE_FOR = {name: protocol.claims for name, protocol in PROTOCOLS.items() if protocol.claims}
"""The protocols that decide some claims alone, and which."""
PAPER_SAMPLES = 10
"""The paper's weight samples a batch."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All finished levels (``Finished.all_levels``, with ``base``: at the protocol's own learning rate), and the layers
    of the last level of each run.
    """

    levels: pd.DataFrame
    layers: pd.DataFrame

    def of_claim(self, number: int) -> Evidence:
        """The evidence that decides a claim: for each network that of protocols made for it where there is some, otherwise that of protocols made for none."""
        own = self.levels["protocol"].isin([name for name, claims in MADE_FOR.items() if number in claims])
        decided = self.levels["arch"].isin(self.levels.loc[own, "arch"])
        return replace(self, levels=self.levels[own | ~(decided | self.levels["protocol"].isin(MADE_FOR))])

    def seeds(self, arch: str) -> int:
        """How many seeds a statistic of the network needs: as many as its protocols plan, or as many as it has, if these are more."""
        rows = self.levels[self.levels["arch"] == arch]
        planned = [PROTOCOLS[name].seeds for name in rows["protocol"].unique() if name in PROTOCOLS]
        return max([rows["seed"].nunique(), *planned])

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
        """:meth:`networks` of all families, so that a verdict for all is one for each family."""
        return [arch for family in SMALL for arch in self.networks(family)]


def gather(
    roots: Sequence[Path], protocol: str | None = None, data: str | None = None, accuracy: str = "test_accuracy"
) -> tuple[Evidence, list[str]]:
    """The evidence in folders of runs, and in folders of files that ``kept.write`` has written, of one protocol or of all but ``custom``, and a line per
    protocol that says what it is. A run that several have counts once, as ``kept.merged`` says.
    """
    if accuracy not in ACCURACIES:
        raise UserError(f"--accuracy {accuracy}: choose {' or '.join(ACCURACIES)}")
    levels, layers = _complete(roots, protocol, data)
    of_all = levels[~levels["protocol"].isin(MADE_FOR)]
    for arch, several in of_all.groupby("arch")["protocol"].unique().items():
        if len(several) > 1:
            where = " and ".join(map(str, roots))
            raise UserError(f"{where} has {arch} under the protocols {', '.join(several)}; choose one with --protocol")
    lines = []
    for description, rows in levels.groupby("description", sort=False):
        counts = ", ".join(
            f"{arch} ({count} seed{'s' * (count > 1)})"
            for arch, count in rows.groupby("arch")["seed"].nunique().items()
        )
        lines.append(f"{counts}: {description}")
    dense = levels[(levels["level"] == 0) & levels["base"] & ~levels["protocol"].isin(MADE_FOR)]
    if len(dense):
        means = 100 * of_guide(dense).groupby("arch", sort=False)[accuracy].mean()
        lines.append("dense Bayesian networks: " + ", ".join(f"{arch} {mean:.1f} %" for arch, mean in means.items()))
    return Evidence(levels.assign(accuracy=100 * levels[accuracy]), layers), lines


def _complete(roots: Sequence[Path], protocol: str | None, data: str | None) -> Tables:
    """Levels and layers of complete runs, controls and transplants, and of those of which only these are kept."""
    studies = [replace(study, complete=True) for study in read_all(roots, protocol, data)]
    for study in studies:
        if left := sorted({run.folder.path.name for run in study.runs} - set(study.all_levels["run"])):
            print(f"left out, without all levels of their protocol: {', '.join(left)}", file=sys.stderr)
    every = [[study.all_levels for study in studies], [study.layers for study in studies]]
    levels, layers = (pd.concat([f for f in frames if len(f)] or frames[:1]) for frames in every)
    if levels.empty:
        where = " and ".join(map(str, roots))
        raise UserError(
            f"{where} has no complete run; a claim is judged by runs that have all levels of their protocol"
        )
    for name in levels.loc[levels.duplicated(["run", "level"]), "run"]:
        raise UserError(f"runs of two protocols are called {name}; rename the folder of one, or choose a --protocol")
    levels = levels.sort_values(["protocol", "run", "level"], ignore_index=True)[list(COLUMNS)]
    layers = layers.reindex(columns=list(LAYER_COLUMNS)).sort_values(["run", "depth"], ignore_index=True)
    return Tables(levels, layers.astype({name: str for name in LAYER_COLUMNS if name in TEXTS}))
