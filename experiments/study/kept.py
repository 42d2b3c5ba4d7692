"""Finished levels and their layers as CSV, from which figures and claims are made again without the runs, or together with other runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pyro_lottery import files
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.tables import OPTIONS

LEVELS, LAYERS = "claims_levels.csv", "claims_layers.csv"
COLUMNS = (
    "run", "arch", "seed", "guide", "score", "treatment", "rewind", "lr", "warmup_epochs", "level", "density", "test_accuracy",
    "max_test_accuracy", "mace", "step_ms", "train_samples", "base", "protocol", "description", "hardware",
)  # fmt: skip
LAYER_COLUMNS = ("run", "arch", "seed", "guide", "level", "site", "depth", "weights", "sparsity")
TEXTS = ("run", "arch", "guide", "score", "treatment", "rewind", "protocol", "description", "hardware", "site")
"""Columns that are text, even where a run's folder is called 007 or null."""
MEASURED = ("test_accuracy", "max_test_accuracy", "mace", "step_ms")
"""Columns that may be empty."""


class Tables(NamedTuple):
    """Levels and layers of runs."""

    levels: pd.DataFrame
    layers: pd.DataFrame

    def where(self, chosen: pd.Series) -> Tables:
        """The chosen levels, and the layers of their runs."""
        levels = self.levels[chosen]
        return Tables(levels, self.layers[self.layers["run"].isin(levels["run"])])


def holds(folder: Path) -> bool:
    """Whether ``folder`` has such files, and no runs."""
    return (folder / LEVELS).exists() and not any(folder.glob("*/config.json"))


def read(folder: Path) -> Tables:
    """The files in ``folder``; raises ``UserError`` if they are damaged."""
    levels, layers = (_table(folder / name, columns) for name, columns in ((LEVELS, COLUMNS), (LAYERS, LAYER_COLUMNS)))
    for name in levels.loc[levels.duplicated(["run", "level"]), "run"]:
        raise UserError(
            f"{folder / LEVELS} has a level of {name} twice; write it again with python -m experiments.claims"
        )
    return Tables(levels, layers)


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        # This engine reads every number as it was written; the other one of pandas 2 does not.
        texts = dict.fromkeys(TEXTS, str)
        found = pd.read_csv(path, engine="python", dtype=texts, keep_default_na=False, na_values=[""])  # type: ignore[arg-type]
        wrong = [name for name in columns if name not in found or (name not in MEASURED and found[name].hasnans)]
        wrong += [
            name
            for name in found
            if len(found) and name not in TEXTS and not pd.api.types.is_numeric_dtype(found[name])
        ]
    except (ValueError, pd.errors.ParserError) as error:  # UnicodeDecodeError and EmptyDataError are ValueErrors
        wrong = [one_line(error)]
    if wrong:
        raise UserError(
            f"{path} is damaged, or of another version ({', '.join(wrong)}); write it again with python -m experiments.claims"
        )
    return found


def write(tables: Tables, folder: Path) -> None:
    """Write the files to ``folder``."""
    files.write_atomic(folder / LEVELS, tables.levels[list(COLUMNS)].to_csv(index=False).encode())
    files.write_atomic(folder / LAYERS, tables.layers[list(LAYER_COLUMNS)].to_csv(index=False).encode())


def data_of(levels: pd.DataFrame) -> pd.Series:
    """The name of the data of each row, with which its description begins.

    >>> data_of(pd.DataFrame({"description": ["CIFAR-100, 64×64, paper protocol: all training images, 160 epochs"]})).tolist()
    ['CIFAR-100, 64×64']
    """
    return levels["description"].str.extract("^(.*), [^,]* protocol: ", expand=False)


def merged(sources: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The levels of several sources, with ``source``, the number of each. A run that several have, by its options, comes with its controls and transplant
    from the one that has most of their levels, and of equals from the first.

    Raises ``UserError`` if two different runs have one name, if a source has a run twice, or if one protocol has two meanings for the same network.
    """
    parts = [levels.assign(source=number) for number, levels in enumerate(sources) if len(levels)]
    if not parts:
        return sources[0].assign(source=0)
    found, key = pd.concat(parts, ignore_index=True), ["protocol", *OPTIONS]
    family = ["source", "family"]
    found["family"] = found["run"].str.split("/").str[0]
    own = found[found["treatment"] == "imp"].drop_duplicates(family)[[*family, *key]]
    own = own.merge(found.groupby(family, as_index=False).size(), on=family)
    best = own.sort_values(["size", "source"], ascending=[False, True]).drop_duplicates(key)[[*key, "source"]]
    chosen = own.merge(best, on=[*key, "source"])
    found = found[pd.MultiIndex.from_frame(found[family]).isin(pd.MultiIndex.from_frame(chosen[family]))]
    for (arch, protocol), several in found.groupby(["arch", "protocol"])["description"].unique().items():
        if len(several) > 1:
            raise UserError(f"runs of {arch} under the protocol {protocol} cannot be compared: {' and '.join(several)}")
    key = ["protocol", "treatment", *OPTIONS, "level"]
    for _, copies in found[found.duplicated(key, keep=False)].groupby(key):
        raise UserError(f"{' and '.join(copies['run'])} are the same run; keep one of them in the folder")
    for name in found.loc[found.duplicated(["run", "level"]), "run"]:
        raise UserError(f"two different runs are called {name}; rename the folder of one")
    return found.drop(columns="family").reset_index(drop=True)
