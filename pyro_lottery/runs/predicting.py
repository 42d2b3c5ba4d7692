"""Opens a run, or what was exported from one, as a predictor of uint8 images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pyro_lottery.data import in_memory
from pyro_lottery.errors import UserError, check_counts, unknown
from pyro_lottery.exports.formats import GRAPHS
from pyro_lottery.exports.predictor import Predictor
from pyro_lottery.runs.loaded import load_run
from pyro_lottery.runs.packed_ticket import BACKENDS, PACKED, NetworkPredictor, open_packed


def open_folder(
    folder: str | Path, level: int | None = None, samples: int | None = None, backend: str = "auto",
    data_dir: str | None = None, trust_code: bool = False,
) -> Predictor:  # fmt: skip
    """A predictor for a run, or for an export in any format.

    ``level`` is that of a run (default: the last finished one); ``samples`` (default: its own) and ``backend``, a key of
    ``BACKENDS``, are of a run or a packed ticket. Raises ``UserError`` if an option does not fit, or for another folder.
    """
    if backend not in BACKENDS:
        raise unknown("--backend", backend, BACKENDS)
    if samples is not None:
        check_counts(1, samples=samples)
    for name, _, load in GRAPHS.values():
        if (Path(folder) / name).is_file():
            if level is not None or samples is not None or backend != "auto" or data_dir is not None:
                raise UserError(
                    f"{folder} is a {name}, which has its samples in it; omit --level, --samples, --backend and --data-dir"
                )
            if name == "model.pt2" and not trust_code:
                raise UserError(f"{folder}/{name} is a program of torch operations; if you trust it, give --trust-code")
            return load(Path(folder))
    if (Path(folder) / PACKED).is_file():
        if level is not None or data_dir is not None:
            raise UserError(f"{folder} is one exported level; omit --level and --data-dir")
        return open_packed(Path(folder) / PACKED, samples, backend, trust_code)
    run = load_run(folder, trust_code)
    number = run.folder.finished()[-1].level if level is None else level
    network = replace(run.level(number).load_model("cpu"), sparse=BACKENDS[backend])
    if run.shape.num_classes is None:
        raise UserError(f"{folder} has real targets; predict with load_run(path).level(k).load_model() in Python")
    test = in_memory(run.load_data("cpu", data_dir).test)
    if test.inputs.dtype != torch.uint8 or test.inputs.ndim != 4:
        raise UserError(f"{folder} was not trained on uint8 images; predict in Python")
    count = run.config.eval_samples if samples is None else samples
    classes = network.classes or tuple(map(str, range(run.shape.num_classes)))
    return NetworkPredictor(network, test, classes, count, run.config.seed, run.config.image_size is not None)
