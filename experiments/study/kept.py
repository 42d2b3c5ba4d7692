"""Finished levels and their layers as CSV, from which figures and claims are made again without the runs, or together with other runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pyro_lottery import files
from pyro_lottery.errors import UserError
from pyro_lottery.tables import OPTIONS

LEVELS, LAYERS = "claims_levels.csv", "claims_layers.csv"
COLUMNS = (
    "run", "arch", "seed", "guide", "score", "treatment", "rewind", "lr", "warmup_epochs", "level", "density", "test_accuracy",
    "max_test_accuracy", "mace", "step_ms", "train_samples", "base", "protocol", "description",
)  # fmt: skip
LAYER_COLUMNS = ("run", "arch", "seed", "guide", "level", "site", "depth", "weights", "sparsity")
TEXTS = ("run", "arch", "guide", "score", "treatment", "rewind", "protocol", "description", "site")
"""Columns that are text, even where a run's folder is called 007 or null."""

Tables = tuple[pd.DataFrame, pd.DataFrame]
"""Levels and layers."""


def holds(folder: Path) -> bool:
    """Whether ``folder`` has such files, and no runs."""
    return (folder / LEVELS).exists() and not any(folder.glob("*/config.json"))


def read(folder: Path) -> Tables:
    """The files in ``folder``."""
    # This engine reads every number as it was written; the other one of pandas 2 does not.
    levels, layers = (
        pd.read_csv(folder / name, engine="python", dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])
        for name in (LEVELS, LAYERS)
    )  # fmt: skip
    return levels, layers


def write(levels: pd.DataFrame, layers: pd.DataFrame, folder: Path) -> None:
    """Write the files to ``folder``."""
    files.write_atomic(folder / LEVELS, levels[list(COLUMNS)].to_csv(index=False).encode())
    files.write_atomic(folder / LAYERS, layers[list(LAYER_COLUMNS)].to_csv(index=False).encode())


def data_of(levels: pd.DataFrame) -> pd.Series:
    """The name of the data of each row, with which its description begins."""
    return levels["description"].str.split(", ").str[0]


def rows(tables: Tables, chosen: pd.Series) -> Tables:
    """The ``chosen`` levels, and the layers of their runs."""
    levels, layers = tables
    return levels[chosen], layers[layers["run"].isin(levels.loc[chosen, "run"])]


def joined(sources: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The levels of several sources; a run that an earlier one has, with the same options, is left out of a later one.

    Raises ``UserError`` if two different runs have one name, or one protocol has two meanings for the same network.
    """
    key = ["protocol", "treatment", *OPTIONS]
    found, *more = [levels for levels in sources if len(levels)] or [sources[0]]
    for levels in more:
        levels = levels[~pd.MultiIndex.from_frame(levels[key]).isin(pd.MultiIndex.from_frame(found[key]))]
        found = pd.concat([found, levels], ignore_index=True)
    for name in found.loc[found.duplicated(["run", "level"]), "run"]:
        raise UserError(f"two different runs are called {name}; rename the folder of one")
    for (arch, protocol), several in found.groupby(["arch", "protocol"])["description"].unique().items():
        if len(several) > 1:
            raise UserError(f"runs of {arch} under the protocol {protocol} cannot be compared: {' and '.join(several)}")
    return found
