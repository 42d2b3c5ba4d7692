"""What tests share: small networks, small options, small files, and how two runs are compared."""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pyro_lottery as pl
from experiments.trials.weights import Network as TinyNet
from pyro_lottery.imp import run_imp
from pyro_lottery.runs.config import Config
from pyro_lottery.types import Posterior, Ticket

FSYNC = os.fsync
"""The real one, which the tests do without (tests/conftest.py)."""
ROOT = Path(__file__).parent.parent
DEADLOCK = 3600.0
"""Seconds after which a process that a test started is taken for stuck; one beside other work may need many minutes."""
SMALL = {
    "arch": "lenet", "dataset": "digits", "train_size": 200, "epochs": 2, "milestones": (), "train_samples": 1,
    "eval_samples": 2, "levels": 2,
}  # fmt: skip
"""Options of a run that takes about a second."""
QUICK = {"epochs": 2, "batch_size": 16, "train_samples": 1, "milestones": ()}
"""Options of ``pl.train``."""
TIMES = ("train_seconds", "step_ms", "predict_ms", "seconds")
"""Columns that differ between equal runs."""


def small_run(folder, **options):
    """A run in ``folder`` of the ``SMALL`` options and others."""
    return run_imp(Config(**SMALL | {"run_dir": str(folder)} | options))


def wait_for(condition, process=None):
    """Wait until ``condition()`` holds, while ``process`` is running, where one brings it about."""
    end = time.monotonic() + DEADLOCK
    while not condition():
        assert process is None or process.poll() is None, f"the process ended early with {process.returncode}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def fingerprint(run: Path) -> tuple[dict[str, bytes], dict[str, list[list[str]]]]:
    """Everything that must be equal in equal runs: all safetensors, and all of tables and manifests but times."""
    tensors = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}
    tables = {}
    for path in sorted(run.rglob("*.csv")):
        header, *rows = [line.split(",") for line in path.read_text().splitlines()]
        keep = [i for i, name in enumerate(header) if name not in (*TIMES, "crc32")]
        tables[str(path.relative_to(run))] = [[row[i] for i in keep] for row in (header, *rows)]
    for path in sorted(run.rglob("level.json")):
        tables[str(path.relative_to(run))] = _manifest(path)
    return tensors, tables


def _manifest(path: Path) -> list[list[str]]:
    """A manifest, as rows, without times and without the checksums of what holds times."""
    found = json.loads(path.read_text())
    result, files = found["result"], found["files"]
    row = [[name, repr(value)] for name, value in result.items() if name not in TIMES]
    return [*row, ["ticket", str(found["ticket"])], *([n, files[n]] for n in files if n != "history.csv")]


def same(one, other):
    """Whether two dictionaries hold equal tensors under the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tiny(make=pl.guides.mean_field, seed=0, **options):
    """A classifier of a tiny network for ``tiny_data``, and its guide; the same ones for the same seed."""
    torch.manual_seed(seed)
    model = pl.BayesianClassifier(TinyNet(), num_data=60, **options)
    return model, make(model)


def ticket(kept=6):
    """A ticket of ten prunable weights in two sites."""
    # Names that do not sort the way the network orders them.
    loc = {"b10.weight": torch.randn(2, 3), "a.bias": torch.randn(2), "b9.weight": torch.randn(4)}
    scale = {n: t.exp() for n, t in loc.items()}
    first = torch.randperm(10) < kept
    mask = {"b10.weight": first[:6].view(2, 3), "b9.weight": first[6:]}
    return Ticket(mask, Posterior(loc, scale, tuple(mask)), {"bn.running_mean": torch.randn(2)})


def tree(root, sizes=((4, 4), (4, 4)), mode="RGB"):
    """A folder of images as ImageFolder reads it: two classes, of three images for training and three for tests each."""
    rng = np.random.default_rng(0)
    for part, size in zip(("train", "test"), sizes, strict=True):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                shape = size if mode == "L" else (*size, 3)
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return root


def cifar10_jpeg(root: Path, train=3, test=2):
    """A folder of ``train`` and ``test`` images of each class of CIFAR-10, told apart by their colour."""
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(pl.data.CIFAR10):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (20 * label, 100, 10 * i)).save(folder / f"{i}.png")
    return root


def cifar10_c(root: Path, kinds=("fog", "jpeg_compression")):
    """Files like those of CIFAR-10-C, which take no space: image i of severity s has pixels 10 s + i for i below 12, and the label i mod 10."""
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    for kind in kinds:
        images = np.lib.format.open_memmap(folder / f"{kind}.npy", "w+", np.uint8, (50_000, 32, 32, 3))
        for severity in range(1, 6):
            for i in range(12):
                images[10_000 * (severity - 1) + i] = 10 * severity + i
        images.flush()
    np.save(folder / "labels.npy", np.tile(np.arange(10_000) % 10, 5))
    return folder
