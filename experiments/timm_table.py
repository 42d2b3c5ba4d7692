"""Which timm models work, one line each: ``python -m experiments.timm_table -o FOLDER`` writes timm.csv and timm.md there.

Each model has a process of its own, so that a crash or a hang is a row like any other. A repeated command goes on with the
models that have no row yet; ``--again`` also tries those once more that failed.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_lottery as pl
from experiments.study.markdown import markdown_table
from experiments.timm_models import MODELS
from pyro_lottery import guides, masks, scores, seeds
from pyro_lottery.errors import UserError, one_line
from pyro_lottery.files import write_atomic
from pyro_lottery.model.mask_check import used_weights
from pyro_lottery.runs.level_folder import as_csv

SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 384)
"""Image sizes to try, in pixels: the smallest that a model accepts is used."""
CLASSES, TRAIN, TEST = 3, 4, 2
STEPS = ("create", "weights", "local", "prune_50", "prune_99", "save", "predict")
"""The steps, in this order."""
COLUMNS = ("model", "size", "parameters", "prunable", *STEPS, "in_use_50", "in_use_1", "seconds", "note")
WORKS, REFUSED, FAILED, SKIPPED = "works", "refused", "failed", ""


def try_out(name: str) -> dict[str, Any]:
    """One model's row: ``works``, ``refused`` (in one line by ``UserError``) or ``failed`` for every step."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, SKIPPED) | {"model": name}
    said: list[str] = []
    began = time.monotonic()

    @contextmanager
    def step(which: str) -> Iterator[None]:
        try:
            yield
            row[which] = WORKS
        except UserError as error:
            row[which] = REFUSED if "\n" not in str(error) else FAILED
            said.append(f"{which}: {one_line(error)}")
        except Exception as error:  # the table shows any error
            row[which] = FAILED
            said.append(f"{which}: {type(error).__name__}: {one_line(error)}")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        make: Callable[[], Any] | None = None
        with step("create"):
            row["size"], make = _smallest(name)
            model = make()
            guide = guides.mean_field(model)
            initial, data = guides.posterior(guide), _data(row["size"])
            row["parameters"] = sum(p.numel() for p in (*model.parameters(), *initial.loc.values()))
            row["prunable"] = sum(initial.loc[site].numel() for site in model.prunable) / row["parameters"]
        if row["create"] == WORKS:
            for estimator in ("weights", "local"):
                with step(estimator):
                    _train(model, guide, data, estimator)
            mask, net = masks.full(initial), model.net_state()
            for left in (50, 1):
                with step(f"prune_{100 - left}"):
                    mask = masks.shrink(masks.full(initial), scores.snr(initial), 1 - left / 100)
                    model.start_from_(guide, pl.tickets.rewind(mask, initial, net))
                    with pl.handlers.sparsify(mask):
                        _train(model, guide, data, "weights")
                        row[f"in_use_{left}"] = _share_in_use(model, guide, mask, data.test[:TEST])
                    if row[f"in_use_{left}"] > left / 100 + 1e-3:
                        raise AssertionError(f"{row[f'in_use_{left}']:.2%} of the weights in use are not 0")
            _save_and_predict(model, guide, mask, data, make, step)
    told = [one_line(w.message) for w in caught if str(w.message).startswith(("densities count", "at density"))]
    row |= {"seconds": round(time.monotonic() - began, 1), "note": "; ".join(dict.fromkeys([*said, *told]))}
    return row


def _smallest(name: str) -> tuple[int, Callable[[], Any]]:
    """The smallest image size that the plain network accepts, and a function that makes the Bayesian network for it."""
    reason: Exception = UserError("no size fits")
    for size in SIZES:
        try:
            net = pl.create_model(f"timm:{name}", CLASSES, 3, size).eval()
            with torch.no_grad():
                out = net(torch.zeros(1, 3, size, size))
            if out.shape == (1, CLASSES) and bool(out.isfinite().all()):
                break
        except Exception as error:  # each family raises errors of its own
            reason = error
    else:
        raise reason

    def make() -> pl.BayesianClassifier:
        return pl.BayesianClassifier(pl.create_model(f"timm:{name}", CLASSES, 3, size), num_data=TRAIN)

    return size, make


def _data(size: int) -> Any:
    generator = torch.Generator().manual_seed(1)

    def images(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator).byte()
        return pixels, torch.arange(count) % CLASSES

    return pl.data.from_tensors(*images(TRAIN), *images(TEST))


def _train(model: Any, guide: Any, data: Any, estimator: str) -> None:
    """One step of Adam."""
    before = guides.locs(guide)
    row = pl.train(model, guide, data, epochs=1, batch_size=TRAIN, milestones=(), estimator=estimator)[0]
    if not math.isfinite(row["loss"]):
        raise AssertionError(f"the loss is {row['loss']}")
    if all(torch.equal(before[name], value) for name, value in guides.locs(guide).items()):
        raise AssertionError("no loc was changed")


def _share_in_use(model: Any, guide: Any, mask: Any, images: Tensor) -> float:
    """Fraction of the prunable weights that convolutions and linear layers receive that is not 0."""
    values = masks.apply(mask, guides.posterior(guide)).loc
    uses: dict[Any, Any] = {}
    for use in used_weights(model, values, images):
        if set(use.sites) <= set(mask):  # counted once, even if a shared module uses its weight several times
            uses[use.sites] = max(use, uses.get(use.sites, use), key=lambda use: use.nonzero)
    return sum(use.nonzero for use in uses.values()) / sum(use.elements for use in uses.values())


def _save_and_predict(model: Any, guide: Any, mask: Any, data: Any, make: Callable[[], Any], step: Any) -> None:
    """Save the trained ticket, load it into a new network, and compare their predictions bit for bit."""

    def predicted(model: Any, guide: Any, mask: Any) -> Tensor:
        with pl.handlers.sparsify(mask), seeds.rng("cpu", 0, "predict"):
            return pl.predict(model, guide, data.test, 2)

    probs = loaded = None
    with step("predict"):
        probs = predicted(model, guide, mask)
        if not bool(probs.isfinite().all()):
            raise AssertionError("probabilities are not finite")
    with step("save"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket.safetensors"
        pl.Ticket(mask, masks.apply(mask, guides.posterior(guide)), model.net_state()).save(path)
        other = make()
        other_guide = guides.mean_field(other)
        loaded = other.start_from_(other_guide, pl.Ticket.load(path))
    if probs is not None and loaded is not None:
        with step("predict"):
            if not torch.equal(predicted(other, other_guide, loaded), probs):
                raise AssertionError("a loaded network predicts other bits")


def run(folder: Path, models: Sequence[str], timeout: float, again: bool) -> list[dict[str, Any]]:
    """Try the models without a row one after the other, and write the tables after each."""
    path = folder / "timm.csv"
    rows = {row["model"]: row for row in csv.DictReader(path.read_text("utf-8").splitlines() if path.exists() else ())}
    folder.mkdir(parents=True, exist_ok=True)
    for name in models:
        if name in rows and not (again and FAILED in rows[name].values()):
            continue
        rows[name] = _in_a_process(name, timeout)
        _write(folder, list(rows.values()))  # with those of earlier calls
        print(rows[name]["model"], *(rows[name][step] or "-" for step in STEPS), rows[name]["note"], flush=True)
    return [rows[name] for name in models if name in rows]


def _in_a_process(name: str, timeout: float) -> dict[str, Any]:
    failed = dict.fromkeys(COLUMNS, SKIPPED) | {"model": name, "create": FAILED}
    # A fork imports nothing again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name))
    process.start()
    sender.close()
    try:
        if not answer.poll(timeout):
            return failed | {"note": f"not finished after {timeout:g} s", "seconds": timeout}
        return answer.recv()
    except EOFError:
        process.join()
        return failed | {"note": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        answer.close()


def _send(sender: Any, name: str) -> None:
    sender.send(try_out(name))


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomic(folder / "timm.csv", as_csv(COLUMNS, rows))
    write_atomic(folder / "timm.md", markdown(rows).encode())


HEAD = """# timm models, one line each

Each model was tried at the smallest image size that it takes.

- **create**: make it Bayesian. **weights**, **local**: one training step with noise on the weights, and with local noise.
- **50 %**, **1 %**: one step with this share of the prunable weights left. **save**: save that ticket. **same bits**: load it
  into a new network, which must predict the same bits.
- **prunable**: the share of the network's parameters that densities refer to. **in use**: the share of non-zeros among the
  prunable weights that convolutions and linear layers compute with.
- ✓ works, ✗ fails, – was not reached; "no" is refused in one line, which is in the notes.

"""
SIGNS = {WORKS: "✓", FAILED: "✗", SKIPPED: "–", REFUSED: "no"}


HEADINGS = (
    "model", "px", "M parameters", "prunable", "create", "weights", "local", "50 %", "1 %", "save", "same bits",
    "in use, 50 %", "in use, 1 %", "note",
)  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, after a sentence that counts its rows."""
    refused = sum(REFUSED in row.values() and FAILED not in row.values() for row in rows)
    failed = sum(FAILED in row.values() for row in rows)
    lines = [
        HEAD
        + f"{len(rows)} models: {len(rows) - refused - failed} work, {refused} are refused in one line, {failed} fail. "
        f"torch {torch.__version__.split('+')[0]}, on a processor; made by `python -m experiments.timm_table -o plots/gallery`.\n",
    ]
    found = list[Sequence[object]]()
    for row in rows:
        cells = [
            row["model"],
            row["size"],
            _number(row["parameters"], 1e-6, ".1f"),
            _number(row["prunable"], 100, ".0f", " %"),
        ]
        cells += [SIGNS[row[step]] for step in STEPS]
        cells += [_number(row[f"in_use_{left}"], 100, ".2f", " %") for left in (50, 1)]
        note = row["note"].partition(", and stay dense")[0].replace("|", "/")
        found.append([*cells, note[:160]])
    return "\n".join([*lines, *markdown_table(HEADINGS, found)]) + "\n"


def _number(value: Any, factor: float, form: str, unit: str = "") -> str:
    return f"{factor * float(value):{form}}{unit}" if value != "" else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if a model fails."""
    parser = argparse.ArgumentParser(prog="python -m experiments.timm_table", description=str(__doc__))
    parser.add_argument("-o", "--output", type=Path, default=Path("figures"), help="folder for timm.csv and timm.md")
    parser.add_argument("--models", nargs="+", default=MODELS, help="names; default: one or more of each family")
    parser.add_argument("--timeout", type=float, default=300.0, help="time limit of a model in seconds")
    parser.add_argument("--again", action="store_true", help="retry the failed models")
    given = parser.parse_args(arguments)
    rows = run(given.output, given.models, given.timeout, given.again)
    return int(any(FAILED in row.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
