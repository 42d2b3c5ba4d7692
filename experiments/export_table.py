"""Which networks can be exported, and how near they stay: ``python -m experiments.export_table -o FOLDER``.

Each network is trained for a moment and pruned to half on scikit-learn's digits, resized to the smallest size that it takes,
then exported in every form and format, and compared with the run on 64 test images in batches of 1, 32 and 64, from uint8
pixels. Writes exports.csv and exports.md; a repeated command goes on with the networks that have no row yet.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.study.markdown import markdown_table
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.files import write_atomic
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.level_folder import as_csv

OURS = {"lenet": 32, "resnet20": 32, "resnet18": 32, "vgg11": 32, "vit_tiny": 32}
TIMM = {
    "resnet18": 32, "densenet121": 32, "efficientnet_b0": 32, "mobilenetv3_large_100": 32, "convnext_atto": 32, "regnety_002": 32,
    "ghostnet_100": 32, "repvgg_a0": 32, "resnest14d": 32, "dla46_c": 32, "hrnet_w18_small": 32, "vit_tiny_patch16_224": 224,
    "mixer_s16_224": 224, "nf_regnet_b0": 32, "resnetv2_50x1_bit": 32,
}  # fmt: skip
"""Models of timm, each of another family, and the side of the images in pixels."""
NETWORKS = {**OURS, **{f"timm:{name}": size for name, size in TIMM.items()}}
FORMS = ("mean", "draws", "moments")
FORMATS = ("onnx", "pt2")
WAYS = tuple((form, format) for form in FORMS for format in FORMATS)
COLUMNS = ("network", "size", *(f"{form}_{format}" for form, format in WAYS), "seconds", "note")
REFUSED, FAILED = "refused", "failed"


def try_out(arch: str, size: int) -> dict[str, Any]:
    """One network's row: the largest difference from the run for every form and format, or ``refused`` or ``failed``."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"network": arch, "size": size}
    began, said = time.monotonic(), list[str]()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        config = Config(
            arch=arch, dataset="digits", image_size=size, train_size=64, test_size=64, epochs=1, milestones=(), batch_size=32,
            train_samples=1, eval_samples=2, levels=1, prune_fraction=0.5, run_dir=str(Path(folder) / "run"), precision="32",
        )  # fmt: skip
        level = run_imp(config).level(1)
        for form, format in WAYS:
            try:
                facts = level.export(Path(folder) / f"{form}-{format}", form, format).facts
                row[f"{form}_{format}"] = max(facts["largest_difference"].values())
            except UserError as error:
                row[f"{form}_{format}"] = REFUSED
                said.append(one_line(error))
            except Exception as error:  # the table shows any error
                row[f"{form}_{format}"] = FAILED
                said.append(f"{form}, {format}: {type(error).__name__}: {one_line(error)}")
    return row | {"seconds": round(time.monotonic() - began, 1), "note": "; ".join(dict.fromkeys(said))}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, after a sentence that counts its rows."""
    whole = [row for row in rows if all(row[f"{form}_{format}"] not in (REFUSED, FAILED) for form, format in WAYS[:4])]
    head = [
        "# Exported networks, one line each\n",
        "The largest difference of a probability or an entropy from the run's own, over 64 images in batches of 1, 32 and 64, from "
        "uint8 pixels: the whole network was trained for a moment on digits and pruned to half. For moments, the run is the "
        "same pass in torch. `refused` is one line, which is in the notes.\n",
        f"{len(rows)} networks: {len(whole)} are exported as mean and draws in both formats. torch {torch.__version__.split('+')[0]}, "
        "fp32, on a processor; made by `python -m experiments.export_table -o plots/gallery`.\n",
    ]
    titles = ("network", "px", *(f"{form}, {format}" for form, format in WAYS), "note")
    cells = [
        [
            row["network"],
            row["size"],
            *(_cell(row[f"{form}_{format}"]) for form, format in WAYS),
            str(row["note"])[:160],
        ]
        for row in rows
    ]
    return "\n".join([*head, *markdown_table(titles, cells)]) + "\n"


def _cell(value: Any) -> str:
    return value if value in (REFUSED, FAILED) else f"{float(value):.0e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if a network fails."""
    parser = argparse.ArgumentParser(prog="python -m experiments.export_table", description=str(__doc__))
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("figures"), help="folder for exports.csv and exports.md"
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="names; default: ours and 15 of timm")
    given = parser.parse_args(arguments)
    path = given.output / "exports.csv"
    rows = {
        row["network"]: row for row in csv.DictReader(path.read_text("utf-8").splitlines() if path.exists() else ())
    }
    given.output.mkdir(parents=True, exist_ok=True)
    for arch in given.networks:
        if arch not in rows:
            rows[arch] = try_out(arch, NETWORKS.get(arch, 32))
            found = list(rows.values())  # with those of earlier calls
            write_atomic(path, as_csv(COLUMNS, found))
            write_atomic(given.output / "exports.md", markdown(found).encode())
            print(*(rows[arch][name] for name in COLUMNS), flush=True)
    return int(any(FAILED in rows[arch].values() for arch in given.networks))


if __name__ == "__main__":
    sys.exit(main())
