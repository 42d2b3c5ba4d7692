"""The finished levels on which the claims are judged."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from experiments.study.finished import ACCURACIES, of_guide, read
from experiments.study.protocols import PROTOCOLS, protocol_of
from experiments.study.statistics import Curve
from pyro_lottery import files, tables
from pyro_lottery.errors import UserError
from pyro_lottery.runs.config import preset
from pyro_lottery.runs.loaded import Run

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


LEVELS, LAYERS = "claims_levels.csv", "claims_layers.csv"
"""The evidence as files, from which the claims can be judged without the runs."""
TEXTS = ("run", "arch", "guide", "score", "treatment", "rewind", "protocol", "description", "site")
"""Columns that are text, even where a run's folder is called 007 or null."""
COLUMNS = (
    "run", "arch", "seed", "guide", "score", "treatment", "rewind", "lr", "warmup_epochs", "level", "density", *ACCURACIES, "mace",
    "step_ms", "train_samples", "base", "protocol", "description",
)  # fmt: skip
LAYER_COLUMNS = ("run", "seed", "site", "depth", "sparsity")


def gather(
    root: Path, protocol: str | None = None, data: str | None = None, accuracy: str = "test_accuracy"
) -> tuple[Evidence, list[str]]:
    """The evidence in a folder of runs, or if it has none of the files that :func:`keep` has written, of one protocol or of all but ``custom``, and a line
    per protocol that says what it is.
    """
    if (root / LEVELS).exists() and not any(root.glob("*/config.json")):
        # This engine reads every number as it was written; the other one of pandas 2 does not.
        levels, layers = (
            pd.read_csv(
                root / name, engine="python", dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""]
            )
            for name in (LEVELS, LAYERS)
        )
        known = sorted(map(str, levels["protocol"].unique()))
        if protocol is not None:
            levels = levels[levels["protocol"] == protocol]
        if data is not None:
            levels = levels[levels["description"].str.startswith(f"{data}, ")]
        if levels.empty:
            wanted = " and ".join(
                f"--{name} {value}" for name, value in (("protocol", protocol), ("data", data)) if value is not None
            )
            raise UserError(f"{root / LEVELS} has no levels of {wanted}; its protocols: {', '.join(known)}")
        layers = layers[layers["run"].isin(levels["run"])]
    else:
        levels, layers = _of_runs(root, protocol, data)
    if accuracy not in ACCURACIES:
        raise UserError(f"--accuracy {accuracy}: choose {' or '.join(ACCURACIES)}")
    of_all = levels[~levels["protocol"].isin(MADE_FOR)]
    for arch, several in of_all.groupby("arch")["protocol"].unique().items():
        if len(several) > 1:
            raise UserError(f"{root} has {arch} under the protocols {', '.join(several)}; choose one with --protocol")
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


def keep(evidence: Evidence, folder: Path) -> None:
    """Write the evidence as files to ``folder``."""
    files.write_atomic(folder / LEVELS, evidence.levels[list(COLUMNS)].to_csv(index=False).encode())
    files.write_atomic(folder / LAYERS, evidence.layers.to_csv(index=False).encode())


def _of_runs(root: Path, protocol: str | None, data: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    runs = [run for run in tables.list_runs(root) if run.folder.results()]
    found = {protocol_of(run.config) for run in runs if data in (None, run.config.data_name)}
    names = [protocol] if protocol else sorted(found - {"custom"}) or [None]
    studies = [read(root, name, data) for name in names]
    parts, all_layers = [], []
    for study in studies:
        # --levels may differ from the protocol's, and would change the level at which all runs are compared.
        levels = preset(study.protocol).levels if study.protocol in PROTOCOLS else None
        complete = [
            r for r in study.runs if len(r.folder.results()) == (r.config.levels if levels is None else levels) + 1
        ]
        if left := sorted({run.folder.path.name for run in study.runs} - {run.folder.path.name for run in complete}):
            print(f"left out, without all levels of their protocol: {', '.join(left)}", file=sys.stderr)
        if not complete:
            continue
        frame = replace(study, runs=complete).all_levels.assign(protocol=study.protocol, description=study.description)
        own = frame.groupby("run")["level"].agg(set)
        whole = {
            str(derived.folder.path)
            for run in complete
            for treatment, derived in tables.with_derived(run)
            if treatment == "imp" or _derived_levels(study.protocol, run) <= own.get(str(derived.folder.path), set())
        }
        parts.append(frame[frame["run"].isin(whole)])
        all_layers.append(replace(study, runs=complete).layers)
    if not parts:
        raise UserError(f"{root} has no complete run; a claim is judged by runs that have all levels of their protocol")
    relative = [
        frame.assign(run=[str(Path(run).relative_to(root)) for run in frame["run"]])
        for frame in (pd.concat(parts, ignore_index=True), pd.concat(all_layers, ignore_index=True))
    ]
    return relative[0][list(COLUMNS)], relative[1].reindex(columns=list(LAYER_COLUMNS)).astype(
        {"run": str, "site": str}
    )


def _derived_levels(protocol: str, run: Run) -> set[int]:
    """The levels that a complete control or transplant of ``run`` has: all but the dense one, unless the protocol has others."""
    levels = PROTOCOLS[protocol].derived_levels if protocol in PROTOCOLS else None
    return set(range(1, run.config.levels + 1) if levels is None else levels)
