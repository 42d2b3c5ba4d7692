"""Exports a finished level: a file that runs elsewhere, compared with the run's own predictions before it is put in place."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lottery import files, guides, metrics, packed, prediction, tickets, weights
from pyro_lottery.data import in_memory
from pyro_lottery.errors import Failed, UserError, check_counts, unknown
from pyro_lottery.exports import formats, predictor
from pyro_lottery.exports.predictor import Predictor
from pyro_lottery.exports.state_dicts import LAYOUTS
from pyro_lottery.model import BayesianClassifier
from pyro_lottery.runs.build import build, dense_ticket
from pyro_lottery.runs.card import card, check_licence, detections
from pyro_lottery.runs.export_forms import STATE, WRITERS, Job, Outputs
from pyro_lottery.runs.packed_ticket import PACKED, SAMPLES, NetworkPredictor, open_packed
from pyro_lottery.runs.trained import rebuild

if TYPE_CHECKING:
    from pyro_lottery.runs.loaded import Level

FORMS = ("draws", "mean", "moments")
FORMATS = tuple(WRITERS)
TOLERANCE = 1e-5
"""Largest difference of a probability or an entropy between an exported network and the run's own."""
FACTS = "export.json"
SIZES = (1, 32)
"""Batch sizes at which an export is compared with the run, beside large ones."""


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, and the facts in its ``export.json``."""

    folder: Path
    facts: Mapping[str, Any]


def export(
    level: Level, folder: str | Path, form: str | None = None, format: str = "onnx", *, samples: int | None = None,
    seed: int | None = None, dtype: str = "fp32", tolerance: float = TOLERANCE, licence: str = "unknown",
    data_dir: str | Path | None = None,
) -> Exported:  # fmt: skip
    """Write a finished level as one file that runs elsewhere, with a model card, to a new ``folder``.

    ``form`` is ``mean``, one pass with the posterior's locs; ``draws``, ``samples`` draws of the weights by ``seed`` (defaults:
    those of the run, so that the outputs are the probabilities behind results.csv, computed in fp32); or ``moments``, one pass
    of means and variances (:mod:`pyro_lottery.exports.moments`). The default is ``draws``, and ``mean`` for a state dict.

    ``format`` is ``onnx`` or ``pt2``, a network without random numbers whose input ``images`` is uint8 [n, c, h, w] for any n,
    with normalisation inside and batch normalisation folded; or ``safetensors``, a small file of mask, loc and scale in
    ``dtype`` (:mod:`pyro_lottery.packed`), which ``pl.Ticket.load`` reads; or a state dict of PyTorch: ``state_dict`` with zeros, ``prune`` with the masks of
    ``torch.nn.utils.prune``, or ``csr`` with sparse matrices for linear layers. Outputs are ``probs`` [n, classes] and entropies
    [n]: ``total`` and, for ``draws``, ``aleatoric`` and ``epistemic``.

    What was written is loaded again and predicts all test images. Raises ``Failed``, and writes nothing, if an output differs
    from the run's by more than ``tolerance``; values of another ``dtype`` than fp32 may differ, and the loss is measured.
    Raises ``UserError`` if the level cannot be exported like this, or if ``folder`` exists.
    """
    _check_place(level, Path(folder))
    check_licence(licence)
    form = form or ("mean" if format in LAYOUTS else "draws")
    _check(level, form, format, samples, seed, dtype, tolerance)
    ood = detections(level)
    job = _job(level, form, format, samples, seed, dtype, data_dir)
    with _placed(Path(folder)) as place:
        expected, facts = WRITERS[format](job, place)
        found = _outputs(_opened(job, place), job.test.inputs.numpy(), list(expected))
        differences = {name: max(_difference(part[name], value) for part in found) for name, value in expected.items()}
        worst = max(differences, key=lambda name: differences[name])
        if dtype == "fp32" and differences[worst] > tolerance:
            raise Failed(
                f"{worst} of the exported network differs by {differences[worst]:.2g} from the run's, more than --tolerance "
                f"{tolerance:g}; nothing was written"
            )
        # Rounded weights differ, but an image's outputs must not depend on the other images of its batch.
        mixed = {name: max(_difference(part[name], value) for part in found) for name, value in found[0].items()}
        if max(mixed.values()) > max(tolerance, TOLERANCE):
            worst = max(mixed, key=lambda name: mixed[name])
            raise Failed(
                f"{worst} of an image differs by {mixed[worst]:.2g} with the size of its batch, so the network mixes the images of a batch, which a "
                "file cannot promise; nothing was written"
            )
        file = place / facts["file"]
        facts |= {
            "bytes": file.stat().st_size, "crc32": files.crc32_of(file), "largest_difference": differences,
            "tolerance": tolerance, "compared_images": len(job.test),
            "measured": metrics.all_metrics(found[0]["probs"], job.test.labels),
            "measured_in_fp32": metrics.all_metrics(expected["probs"], job.test.labels),
        }  # fmt: skip
        if format == "onnx":
            shutil.copyfile(predictor.__file__, place / "predictor.py")
        files.write_json(place / FACTS, facts)
        files.write_atomic(place / "README.md", card(level, facts, licence, ood).encode())
    return Exported(Path(folder), facts)


def _check_place(level: Level, folder: Path) -> None:
    if folder.name in ("", "..") or "\0" in folder.name:
        raise UserError(f"-o {folder}: this is no name of a new folder")
    if os.path.lexists(folder):
        raise UserError(f"-o {folder} exists; choose a new folder")
    if level.run.folder.path.resolve() in folder.absolute().resolve().parents:
        raise UserError(f"-o {folder} is in the run's folder, which holds only what runs write; choose another place")


def _check(
    level: Level, form: str, format: str, samples: int | None, seed: int | None, dtype: str, tolerance: float
) -> None:  # fmt: skip
    if form not in FORMS:
        raise unknown("--form", form, FORMS)
    if format not in FORMATS:
        raise unknown("--format", format, FORMATS)
    if dtype not in packed.DTYPES:
        raise unknown("--dtype", dtype, packed.DTYPES)
    if dtype != "fp32" and format != "safetensors":
        raise UserError(f"--dtype {dtype} is for --format safetensors; a network in {format} computes in fp32")
    if form != "mean" and format in LAYOUTS:
        raise UserError(f"--format {format} holds one weight for each; omit --form {form}")
    if form == "moments" and format == "safetensors":
        raise UserError("--format safetensors holds loc and scale; choose --form draws, or mean to leave out the scale")
    if samples is not None:
        check_counts(1, samples=samples)
        if format == "safetensors" and samples > SAMPLES:
            raise UserError(
                f"--format safetensors asks for at most {SAMPLES:,} draws by itself, got --samples {samples:,}"
            )
    if not 0 <= tolerance < math.inf:
        raise UserError(f"--tolerance must be a finite number, at least 0, got {tolerance}")
    if form != "draws" and not (samples is None and seed is None):
        raise UserError(f"--samples and --seed are of --form draws; --form {form} draws nothing")
    if level.run.shape.num_classes is None:
        raise UserError(f"{level.run.folder.path} has real targets; only classifiers of images can be exported")
    formats.check_installed(format)


def _job(
    level: Level, form: str, format: str, samples: int | None, seed: int | None, dtype: str, data_dir: str | Path | None
) -> Job:
    config = level.run.config
    network = replace(level.load_model("cpu"), precision="32", sparse="off")
    if type(network.model).likelihood is not BayesianClassifier.likelihood:
        raise UserError(
            f"{type(network.model).__name__} has a likelihood of its own; only softmax classifiers can be exported"
        )
    point, posterior = guides.is_point(network.guide), level.posterior
    if form == "draws" and format == "safetensors" and not point and (posterior.extra or posterior.scale is None):
        raise UserError(
            f"--format safetensors holds loc and scale, which do not determine guide {config.guide}; choose --form mean, or another format"
        )
    test = in_memory(level.run.load_data("cpu", data_dir).test)
    if test.inputs.dtype != torch.uint8 or test.inputs.ndim != 4:
        raise UserError(
            f"the run's test examples are {test.inputs.dtype} {list(test.inputs.shape)}; only uint8 images [n, c, h, w] "
            "can be exported"
        )
    count = 1 if point else config.eval_samples if samples is None else samples
    return Job(level, network, test, form, format, count, config.seed if seed is None else seed, dtype)


@contextmanager
def _placed(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` at the end, and is removed if anything fails before."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    missing = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        files.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.exists():
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


def _opened(job: Job, place: Path) -> Predictor:
    """A predictor of what was written, from the file alone."""
    run = job.level.run
    if job.format in formats.GRAPHS:
        return formats.GRAPHS[job.format][2](place)
    if job.format == "safetensors":
        return open_packed(place / PACKED, backend="dense", trust_code=True, own=run.own)  # its code is the run's
    config, own = replace(run.config, guide="deterministic"), None if run.own is None else replace(run.own, guide=None)
    read = weights.load(place / STATE)
    into = dense_ticket(*build(config, run.shape, own=own))
    values = weights.fit(read.path, tickets.bake_pruned(read.values), {**into.start.loc, **into.net})
    found = rebuild(
        config,
        run.shape,
        tickets.transplant(values, job.network.mask, into),
        job.level.number,
        run.classes,
        whose=STATE,
        own=own,
    )
    return NetworkPredictor(replace(found, sparse="off"), job.test, job.classes, 1, job.seed, False)


def _outputs(network: Predictor, images: np.ndarray, names: Sequence[str]) -> list[Outputs]:
    """The outputs for all images in batches, and for the first ones in batches of other sizes."""

    def of(parts: list[np.ndarray]) -> Outputs:
        found = [network(part) for part in parts]
        return {name: torch.from_numpy(np.concatenate([each[name] for each in found])) for name in names}

    whole = [images[i : i + prediction.BATCH] for i in range(0, len(images), prediction.BATCH)]
    return [of(whole), *(of([images[:size]]) for size in SIZES if size <= len(images))]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    largest = float((found.double() - expected[: len(found)].double()).abs().max())
    return largest if largest == largest else float("inf")
