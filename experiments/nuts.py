"""Question: how far are the approximate posteriors of a small ticket from its exact one?

Finds a ticket of a few hundred weights of a network with one hidden layer on digits, by iterative pruning. Then NUTS samples the posterior of
its surviving weights, and each other posterior is trained on the same ticket. Writes ``OUT/nuts.csv`` and ``OUT/nuts.md``: for every
posterior its accuracy and NLL, the agreement and the total variation of its predictions with those of NUTS (Izmailov et al. 2021),
and for NUTS R-hat and effective draws in function space.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_lottery as pl
from experiments.study.markdown import markdown_table
from pyro_lottery import guides, machine, masks, metrics
from pyro_lottery.handlers import sparsify
from pyro_lottery.imp import run_imp
from pyro_lottery.posteriors.nuts import Chains
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import Config
from pyro_lottery.runs.loaded import Level

HIDDEN = 12
POSTERIORS = ("mean_field", "laplace", "swag", "sgld", "deterministic")
COLUMNS = ("posterior", "accuracy", "NLL", "agreement", "total variation", "seconds")


def network(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """One hidden layer of ``HIDDEN`` units."""
    inputs = in_channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, num_classes))


def approximate(level: Level, name: str, train: dict[str, Any], samples: int, seed: int) -> Tensor:
    """Class probabilities [n, classes] of the test images by the posterior ``name``, trained on the ticket of ``level``."""
    run, ticket = level.run, level.ticket
    data = run.load_data()
    model = pl.BayesianClassifier(
        network(run.shape.classes, run.shape.in_channels, run.shape.image_size[0]), pl.priors.normal(1.0),
        num_data=run.shape.num_data, kl_temperature=run.config.kl_temperature,
    )  # fmt: skip
    guide = guides.by_name(name, model, run.config.init_scale)
    model.start_from_(guide, ticket)
    with sparsify(ticket.mask):
        pl.train(model, guide, data, seed=seed, **train)
        pl.posteriors.find_scales_(
            model, guide, data, ticket.mask, epoch=train["epochs"], seed=seed, weight_decay=train["weight_decay"]
        )
        with pl.seeds.rng("cpu", seed, "predict"):
            return pl.predict(model, guide, data.test, samples)


def parser() -> Parser:
    """The command line."""
    parser = Parser("python -m experiments.nuts", str(__doc__))
    parser.add_argument("--draws", type=int, default=400, help="draws of each chain (default: 400)")
    parser.add_argument("--warmup", type=int, default=250, help="steps of warm-up of each chain (default: 250)")
    parser.add_argument("--chains", type=int, default=4, help="chains (default: 4)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each training (default: 60)")
    parser.add_argument("--train-size", type=int, help="number of training images; default: all")
    parser.add_argument("--samples", type=int, default=200, help="draws of the other posteriors (default: 200)")
    parser.add_argument(
        "--members", type=int, default=5, help="trainings of the ensemble, with other batches and noise (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/nuts"), help="folder of the run (default: runs/nuts)")
    parser.add_argument("-o", "--out", type=Path, help="folder of the tables; default: --runs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = vars(parser().parse_args(arguments))
    return run_command("python -m experiments.nuts", lambda: work(**given), arguments)


def work(
    draws: int,
    warmup: int,
    chains: int,
    epochs: int,
    train_size: int | None,
    samples: int,
    members: int,
    seed: int,
    runs: Path,
    out: Path | None,
) -> None:
    """Find the ticket, sample, compare, write."""
    # T = 1: the posterior itself. No weight decay, which would be a second prior.
    train: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": 64,
        "lr": 0.01,
        "milestones": (round(0.7 * epochs),),
        "weight_decay": 0.0,
    }
    config = Config(
        arch="experiments.nuts:network", dataset="digits", train_size=train_size, kl_temperature=1.0, levels=2, prune_to=0.2, seed=seed,
        run_dir=str(runs / f"ticket-{epochs}-{train_size}-{seed}"), **train,
    )  # fmt: skip
    level = run_imp(config).level(2)
    began = time.perf_counter()
    truth = pl.nuts(level, draws=draws, warmup=warmup, chains=chains, seed=seed)
    seconds = time.perf_counter() - began
    labels = level.run.load_data().test.labels  # type: ignore[union-attr]
    rows = [
        _row("NUTS", truth.mean, truth.mean, labels, seconds),
        _row(
            "NUTS, one chain against the others", truth.probs[0].mean(0), truth.probs[1:].mean((0, 1)), labels, seconds
        ),
    ]
    for name in POSTERIORS:
        began = time.perf_counter()
        found = approximate(level, name, train, samples, seed)
        rows.append(_row(name, found, truth.mean, labels, time.perf_counter() - began))
    began = time.perf_counter()
    several = [approximate(level, "deterministic", train, 1, seed + 1 + member) for member in range(members)]
    rows.append(
        _row(
            f"ensemble of {members} trainings",
            torch.stack(several).mean(0),
            truth.mean,
            labels,
            time.perf_counter() - began,
        )
    )
    out, table = out or runs, pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "nuts.csv", index=False)
    text = page(level, truth, table)
    (out / "nuts.md").write_text(text)
    print(text)


def page(level: Level, truth: Chains, table: pd.DataFrame) -> str:
    """What was sampled and how well its chains agree, and the ``table`` of posteriors."""
    chains, draws, weights = truth.weights.shape
    rhat, ess = truth.rhat.flatten(), truth.ess.flatten()
    numbers = [
        f"{weights} weights ({masks.remaining(level.mask)} of {masks.total(level.mask)} prunable ones), digits (8×8), "
    ]
    numbers += [
        f"{level.run.shape.num_data} training images, T = 1, {chains} chains of {draws} draws, seed {level.run.config.seed}; "
    ]
    numbers += [
        f"{machine.processor_name()}.\nR-hat of {len(rhat):,} predicted probabilities: median {rhat.median():.3f}, "
    ]
    numbers += [
        f"95 % below {rhat.quantile(0.95):.3f}, greatest {rhat.max():.3f}; effective draws: median {ess.median():.0f}, "
    ]
    numbers += [
        f"95 % above {ess.quantile(0.05):.0f}, least {ess.min():.0f}; {truth.divergences} divergent trajectories."
    ]
    cells = [
        (r.posterior, f"{r.accuracy:.1%}", f"{r.nll:.3f}", f"{r.agreement:.3f}", f"{r.total_variation:.3f}", f"{r.seconds:.0f}")
        for r in table.itertuples()
    ]  # fmt: skip
    return "\n".join(["".join(numbers), "", *markdown_table(COLUMNS, cells), ""])


def _row(name: str, probs: Tensor, truth: Tensor, labels: Tensor, seconds: float) -> dict[str, Any]:
    return {
        "posterior": name, "accuracy": metrics.accuracy(probs, labels), "nll": metrics.nll(probs, labels),
        "agreement": metrics.agreement(probs, truth), "total_variation": metrics.total_variation(probs, truth), "seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
