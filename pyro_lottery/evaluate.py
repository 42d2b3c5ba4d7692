"""Measures the uncertainty of a run's levels: ``python -m pyro_lottery.evaluate RUN --ood noise permuted --corruptions``.

For each level it measures accuracy (also per class), calibration with its reliability diagram, the NLL after temperature scaling, entropies,
selective accuracy, and all metrics against the number of samples. ``--ood`` measures how well other images are detected, and
``--corruptions`` the metrics on corrupted test images. Tables and figures go to ``RUN/evaluation/``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lottery import data, guides, metrics
from pyro_lottery.data import Split, in_memory
from pyro_lottery.errors import UserError
from pyro_lottery.machine import resolve_device
from pyro_lottery.prediction import Predictive, last
from pyro_lottery.runs import progress as console
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.figures import plot_evaluation
from pyro_lottery.runs.loaded import Run, TrainedNetwork, check_levels, load_run

PROG = "python -m pyro_lottery.evaluate"
COVERAGES = [k / 20 for k in range(1, 21)]
CALIBRATION = (metrics.smooth_ece, metrics.adaptive_ece, metrics.classwise_ece, metrics.calibrated_nll)
Rows = list[dict[str, Any]]


def evaluate(
    run: Run,
    levels: Iterable[int] | None = None,
    *,
    samples: int | None = None,
    ood: Sequence[str] = (),
    corruptions: bool = False,
    baseline: Run | None = None,
    device: str = "auto",
    data_dir: str | None = None,
) -> dict[str, Rows]:
    """Measure the uncertainty of ``levels`` (default: all finished) with ``samples`` draws (default: ``eval_samples``).

    Returns and writes the tables ``uncertainty``, ``classes``, ``samples``, ``selective`` and ``reliability``, each a list
    of rows. ``ood`` adds the tables ``ood`` and ``histogram`` (of the total entropy of test and other images), and
    ``corruptions`` adds ``corruptions``: all of CIFAR-10-C if the run is of CIFAR-10 and the files are in the data folder, otherwise those of this package.
    ``baseline``, usually a deterministic run of the same images and densities, adds to ``ood`` how well one minus its maximum softmax (Hendrycks & Gimpel 2017)
    detects the same images at the same levels, as the score ``baseline``. In the files, the rows of other levels stay. ``data_dir`` is the folder of the
    run's data if it has moved. All draws use the run's seed, so a second call gives the same values. Raises ``UserError``
    if the run has real targets, or if an option or ``baseline`` does not fit it.
    """
    chosen, where = check_levels(run, levels), resolve_device(device)
    count = run.config.eval_samples if samples is None else samples
    if count < 1:
        raise UserError(f"--samples must be at least 1, got {count}")
    if run.shape.num_classes is None:
        raise UserError(f"{run.folder.path} has real targets; see its RMSE, NLL and coverages in results.csv")
    test = in_memory(run.load_data(where, data_dir).test)
    if (ood or corruptions) and len(run.shape.image_size) != 2:
        raise UserError(f"{run.folder.path} was not trained on images; omit --ood and --corruptions")
    if run.config.dataset in ood:
        raise UserError(f"--ood {run.config.dataset}: the run was trained on these images; choose others")
    place, size = data_dir or run.config.data_dir, run.config.image_size
    is_cifar10 = tuple(run.classes or ()) == data.CIFAR10 and test.inputs.shape[1:] == (3, 32, 32)
    of_files = data.cifar10_c(place) if is_cifar10 else ()
    kinds, source = (of_files, "CIFAR-10-C") if of_files else (data.CORRUPTIONS, "pyro_lottery")
    kinds = kinds if corruptions else ()

    def corrupted(kind: str, severity: int) -> Split:
        return data.from_cifar10_c(test, place, kind, severity) if of_files else data.corrupt(test, kind, severity)

    others = {name: data.out_of_distribution(test, name, place, size) for name in dict.fromkeys(ood)}
    if baseline is not None:
        _check_baseline(baseline, run, chosen, test, others, where, data_dir)
    tables: dict[str, Rows] = {"uncertainty": [], "classes": [], "samples": [], "selective": [], "reliability": []}
    tables |= ({"ood": [], "histogram": []} if others else {}) | ({"corruptions": []} if corruptions else {})
    with run.folder.derived("evaluation").lock(), console.progress() as bar:
        task = bar.add_task("", total=len(chosen) * (1 + len(others) + len(kinds) * len(data.SEVERITIES)))
        for number in chosen:
            bar.update(task, description=f"level {number}")
            level = run.level(number)
            network, density = level.load_model(where), run.results.set_index("level")["density"][number]
            drawn = 1 if guides.is_point(network.guide) else count
            for name, rows in _of_level(network, run.config, test, others, kinds, corrupted, source, count):
                tables[name] += [{"level": number, "density": density, "num_samples": drawn} | row for row in rows]
                bar.advance(task, name in ("uncertainty", "ood", "corruptions"))
            if baseline is not None:
                rows = list(_of_baseline(baseline, number, test, others, count, where))
                tables["ood"] += [{"level": number, "density": density} | row for row in rows]
            every = {name: run.folder.save_evaluation(name, rows) for name, rows in tables.items()}
    # Levels that were evaluated earlier with other numbers of draws have entropies of their own.
    plot_evaluation(run.folder, {name: [row for row in rows if _of_draws(row, drawn)] for name, rows in every.items()})
    return tables


def _of_draws(row: Mapping[str, Any], count: int) -> bool:
    """Whether a row is of ``count`` draws, or of a baseline, which has its own."""
    return row["num_samples"] == count or math.isnan(row["num_samples"])


def _of_level(
    network: TrainedNetwork,
    config: Config,
    test: Split,
    others: dict[str, Split],
    kinds: Sequence[str],
    corrupted: Callable[[str, int], Split],
    source: str,
    count: int,
) -> Iterator[tuple[str, Rows]]:
    def predictive(images: Split) -> Predictive:
        return last(network.predictives(images, count, config.seed))

    for inside in network.predictives(test, count, config.seed):
        measured = metrics.all_metrics(inside.probs, test.labels)
        yield "samples", [{"samples": inside.num_samples} | measured]
    predicted = inside.probs.argmax(1)
    confidence = -metrics.doubt(inside.probs)  # the largest probability itself is 1 where logits are 17 apart
    correct = predicted == test.labels
    entropies = {name: float(getattr(inside, name).mean()) for name in ("total", "aleatoric", "epistemic")}
    defined = CALIBRATION if len(test) > 1 else [f for f in CALIBRATION if f is not metrics.calibrated_nll]
    calibration = dict.fromkeys((f.__name__ for f in CALIBRATION), math.nan)
    calibration |= {f.__name__: f(inside.probs, test.labels) for f in defined}
    areas = {f.__name__: f(confidence, correct) for f in (metrics.aurc, metrics.augrc)}
    yield "uncertainty", [measured | entropies | areas | calibration]
    yield "classes", _by_class(predicted, test.labels, network.classes or tuple(map(str, range(inside.probs.shape[1]))))
    risk = metrics.selective(confidence, correct)
    kept = [max(1, round(coverage * len(risk))) for coverage in COVERAGES]
    yield "selective", [{"coverage": k / len(risk), "accuracy": 1 - float(risk[k - 1])} for k in kept]
    bins = zip(*(column.tolist() for column in metrics.reliability(inside.probs, test.labels)), strict=True)
    yield "reliability", [{"confidence": mean, "accuracy": right, "images": n} for mean, right, n in bins]
    if others:
        yield "histogram", _histogram("test", inside)
    for name, split in others.items():
        outside = predictive(split)
        yield "histogram", _histogram(name, outside)
        yield "ood", [_detection(name, score, a, b) for score, a, b in _scores(inside, outside)]
    for kind in kinds:
        for severity in data.SEVERITIES:
            changed = corrupted(kind, severity)
            found = metrics.all_metrics(predictive(changed).probs, changed.labels)
            yield "corruptions", [{"corruption": kind, "severity": severity} | found | {"source": source}]


def _by_class(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> Rows:
    """For each class, the number of test images, the share of them classified correctly, and the number of its predictions."""
    rows: Rows = []
    for label, name in enumerate(names):
        found = predicted[labels == label] == label
        accuracy = float(found.double().mean()) if len(found) else math.nan
        taken = int((predicted == label).sum())
        rows.append({"label": label, "class": name, "images": len(found), "accuracy": accuracy, "predicted": taken})
    return rows


def _scores(inside: Predictive, outside: Predictive) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in ("total", "aleatoric", "epistemic"):
        yield name, getattr(inside, name), getattr(outside, name)
    yield "confidence", metrics.doubt(inside.probs), metrics.doubt(outside.probs)


def _detection(name: str, score: str, inside: Tensor, outside: Tensor) -> dict[str, Any]:
    return {
        "ood": name, "score": score, "auroc": metrics.auroc(inside, outside), "fpr95": metrics.fpr95(inside, outside),
        "aupr_out": metrics.aupr(inside, outside), "aupr_in": metrics.aupr(-outside, -inside),
        "mean_inside": float(inside.mean()), "mean_outside": float(outside.mean()),
    }  # fmt: skip


def _check_baseline(
    baseline: Run,
    run: Run,
    chosen: Iterable[int],
    test: Split,
    others: dict[str, Split],
    where: torch.device,
    data_dir: str | None,
) -> None:
    """Raises ``UserError`` unless ``baseline`` has the network, levels, densities and test images of ``run``, so that only posteriors differ."""
    place = f"--baseline {baseline.folder.path}"
    if baseline.config.arch != run.config.arch:
        raise UserError(f"{place}: it is a {baseline.config.arch}; give a run of {run.config.arch}")
    if not others:
        raise UserError(f"{place}: it is measured beside other images; give --ood too")
    there, here = (found.results.set_index("level")["density"] for found in (baseline, run))
    for level in chosen:
        if level not in there or not math.isclose(there[level], here[level], rel_tol=0.01):
            found = f"has {there[level]:.1%}" if level in there else "is not finished"
            raise UserError(
                f"{place}: its level {level} {found}; give a run whose level {level} has {here[level]:.1%} of the weights, or choose others with --levels"
            )
    own = in_memory(baseline.load_data(where, data_dir).test)
    if not all(getattr(own, part).equal(getattr(test, part)) for part in ("inputs", "targets", "mean", "std")):
        raise UserError(f"{place}: its test images are not those of {run.folder.path}; give a run of the same data")


def _of_baseline(
    baseline: Run, number: int, test: Split, others: dict[str, Split], count: int, where: torch.device
) -> Iterator[dict[str, Any]]:
    network = baseline.level(number).load_model(where)

    def doubt(images: Split) -> Tensor:
        return metrics.doubt(last(network.predictives(images, count, baseline.config.seed)).probs)

    inside, drawn = doubt(test), 1 if guides.is_point(network.guide) else count
    for name, split in others.items():
        yield {"num_samples": drawn} | _detection(name, "baseline", inside, doubt(split))


def _histogram(images: str, predictive: Predictive) -> Rows:
    """A histogram of the total entropy: the share of images in equal bins from 0 to the maximum, log(classes)."""
    most = math.log(predictive.probs.shape[1])
    # rounding can put the entropy of a uniform predictive above the maximum
    shares, edges = predictive.total.clamp_max(most).cpu().histogram(metrics.BINS, range=(0.0, most))
    centres, shares = (edges[1:] + edges[:-1]) / 2, shares / len(predictive.probs)
    return [
        {"images": images, "entropy": e, "share": s} for e, s in zip(centres.tolist(), shares.tolist(), strict=True)
    ]


def parser() -> Parser:
    """The command line."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("run", help="run folder")
    parser.add_argument("--levels", type=int, nargs="+", help="levels to evaluate; default: all finished levels")
    parser.add_argument("--samples", type=int, help="posterior samples; default: the run's --eval-samples")
    parser.add_argument(
        "--ood", nargs="+", default=(), help=f"out-of-distribution images to detect: {', '.join(data.OOD)}"
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="deterministic run of the same images and densities, whose maximum softmax is to detect the images of --ood too",
    )
    parser.add_argument(
        "--corruptions",
        action="store_true",
        help=f"evaluate corrupted test images, severity 1-5: those of CIFAR-10-C if they are in the data folder, otherwise {', '.join(data.CORRUPTIONS)}",
    )
    parser.add_run_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)

    def work() -> None:
        run = load_run(given.run, given.trust_code)
        names = ("samples", "ood", "corruptions", "device", "data_dir")
        options = {name: getattr(given, name) for name in names}
        options["baseline"] = given.baseline and load_run(given.baseline, given.trust_code)
        for row in evaluate(run, given.levels, **options)["uncertainty"]:
            print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        print(f"tables and figures: {run.folder.path / 'evaluation'}")

    return run_command(PROG, work, arguments, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
