"""Tells whether the posteriors of a run are alive: ``python -m pyro_lottery.diagnose RUN [RUN ...]``.

For each level: how many weights lie on a path from input to output, how many scales left their start, the KL divergence, the
epistemic share of the predictive entropy, how many signs are those of the start, and the barriers to the level before. More runs, of
other seeds, are compared with the first by their masks. Tables go to ``RUN/evaluation/``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor

from pyro_lottery import diagnostics, guides, masks, seeds, tickets
from pyro_lottery.data import Data, in_memory, stratified_split
from pyro_lottery.errors import UserError
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.modes import evaluating
from pyro_lottery.posteriors import update_batch_norm_
from pyro_lottery.prediction import Predictive
from pyro_lottery.runs import progress as console
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.loaded import Level, Run, check_levels, load_run
from pyro_lottery.scores import Context
from pyro_lottery.training import TrainState
from pyro_lottery.types import Posterior, Sites, Ticket

PROG = "python -m pyro_lottery.diagnose"
EXAMPLES, DRAWS, STEPS, POINTS = 500, 2, 4, 7
"""Test examples of a barrier, draws of its expectation, batches of training examples for BatchNorm's statistics, and places on the line."""
BARRIERS = ("barrier_nll", "barrier_free_energy")
ALIVE = 0.01
"""The share of scales that have moved below which a warning is given."""
Rows = list[dict[str, Any]]


def diagnose(
    run: Run,
    others: Sequence[Run] = (),
    levels: Iterable[int] | None = None,
    *,
    barriers: bool = True,
    data_dir: str | None = None,
) -> dict[str, Rows]:
    """The tables ``diagnosis``, a row per level, and ``diagnosis_layers``, a row per level and site; both are written.

    ``others`` are runs of the same network whose masks are compared with those of ``run``. Columns that a run has not, such as those of
    scales for a point guide, are NaN. Raises ``UserError`` if a level is not finished, or ``others`` are of another network.
    """
    chosen, data = check_levels(run, levels), run.load_data("cpu", data_dir)
    for other in others:
        check_levels(other, chosen)
        if {n: m.shape for n, m in other.level(chosen[0]).mask.items()} != {
            n: m.shape for n, m in run.level(chosen[0]).mask.items()
        }:
            raise UserError(f"{other.folder.path} has another network than {run.folder.path}")
    tables: dict[str, Rows] = {"diagnosis": [], "diagnosis_layers": []}
    finished = check_levels(run, None)
    with run.folder.derived("evaluation").lock(), console.progress() as bar:
        task = bar.add_task("", total=len(chosen))
        for number in chosen:
            bar.update(task, description=f"level {number}")
            level = run.level(number)
            row, layers = _of_level(level, data)
            before = run.level(number - 1) if number - 1 in finished else None
            row |= _barriers(level, before, data) if barriers else {}
            row |= _overlaps(level, [other.level(number) for other in others])
            tables["diagnosis"].append(row)
            tables["diagnosis_layers"] += layers
            bar.advance(task)
        for name, rows in tables.items():
            run.folder.save_evaluation(name, rows)
    return tables


def warnings_of(tables: dict[str, Rows]) -> Iterator[str]:
    """What a reader should know before trusting a level, a line each."""
    for row in tables["diagnosis"]:
        if row["scales_moved"] < ALIVE:
            yield (
                f"level {row['level']}: {row['scales_moved']:.2%} of the scales left their start, so its uncertainty is that of --init-scale; train "
                "longer, or with --estimator local"
            )
        if math.isnan(row["effective_density"]):
            yield f"level {row['level']}: its effective density is not known, since the network cannot run in float64"
        elif row["effective_density"] == 0 < row["density"]:
            yield f"level {row['level']}: no weight that can be pruned lies on a path from input to output"
        elif row["effective_density"] < 0.9 * row["density"]:
            yield (
                f"level {row['level']}: {1 - row['effective_density'] / row['density']:.0%} of its weights lie on no path from input to output"
            )
    for row in tables["diagnosis_layers"]:
        if row["density"] == 0:
            yield f"level {row['level']}: no weight is left of {row['site']!r}"


def _of_level(level: Level, data: Data) -> tuple[dict[str, Any], Rows]:
    network, posterior, start, mask = level.load_model(), level.posterior, level.ticket.start, level.mask
    config = level.run.config
    context = Context(network.model, data.train, mask, level.ticket, config.seed, level.number)
    try:
        used = diagnostics.on_paths(context)
        effective, density = masks.density_per_site(used), masks.density(used)
    except UserError:
        effective, density = dict.fromkeys(mask, math.nan), math.nan
    sites, nothing = list(mask), dict.fromkeys(posterior.loc, math.nan)
    has_scales = start.scale is not None and posterior.scale is not None
    # A weight that a schedule has brought back had no start of its own.
    began = {name: m & level.ticket.mask[name] for name, m in mask.items()}
    moved = diagnostics.scales_moved(start, posterior, began) if has_scales else nothing
    is_product = has_scales and _is_product(network.guide, posterior)
    kl = diagnostics.kl_per_site(network.model, posterior, mask) if is_product else nothing
    signs = diagnostics.signs_kept(start, posterior, began)
    counts = {name: int(began[name].sum()) for name in sites}
    layers = [
        {
            "level": level.number, "site": name, "density": float(mask[name].double().mean()),
            "effective_density": effective[name], "scales_moved": moved[name], "kl": kl[name],
            "signs_kept": signs[name],
        }
        for name in sites
    ]  # fmt: skip
    row = {
        "level": level.number, "density": masks.density(mask), "effective_density": density,
        "scales_moved": _mean(moved, counts), "kl": math.fsum(kl.values()), "signs_kept": _mean(signs, counts),
        "epistemic_share": math.nan,
    }  # fmt: skip
    if data.test is not None and level.run.shape.num_classes is not None:
        found = network.predictive(data.test, config.eval_samples, config.seed)
        assert isinstance(found, Predictive)
        if found.num_samples > 1 or guides.is_point(network.guide):  # one draw does not say how far draws differ
            row["epistemic_share"] = float(found.epistemic.mean() / found.total.mean())
    return row, layers


def _is_product(guide: Any, posterior: Posterior) -> bool:
    """Whether q is the product of N(loc, scale²) of single weights, so that the sum of their KLs is that of q."""
    return not posterior.extra or isinstance(guide, AutoDiagonalNormal)


def _mean(values: dict[str, float], counts: dict[str, int]) -> float:
    """The mean over weights of what is known per site."""
    there = {name: count for name, count in counts.items() if count}
    return sum(values[name] * count for name, count in there.items()) / max(1, sum(there.values()))


def _overlaps(level: Level, others: Sequence[Level]) -> dict[str, float]:
    """Jaccard's index of the masks of two runs, averaged over ``others``, and what chance would give."""
    if not others:
        return {}
    rows = [tickets.compare(_as_ticket(level), _as_ticket(other)).iloc[-1] for other in others]
    return {name: float(sum(row[name] for row in rows)) / len(rows) for name in ("jaccard", "chance")}


def _as_ticket(level: Level) -> Ticket:
    return Ticket(level.mask, level.ticket.start, level.ticket.net)


def _barriers(level: Level, before: Level | None, data: Data) -> dict[str, float]:
    """The heights of the barriers between a level and the one before, in nats per example: of the loss at loc, and of the free energy."""
    nothing = dict.fromkeys(BARRIERS, math.nan)
    if before is None or data.test is None:
        return nothing
    network, config = level.load_model(), level.run.config
    model = network.model
    # Of all classes, since test images may be sorted by class.
    few, _ = stratified_split(test := in_memory(data.test), min(EXAMPLES, len(test)), seed=0)
    x, y = few[:], few.targets

    def nll_at(weights: Sites) -> float:
        update_batch_norm_(
            model, weights, data, TrainState(config.epochs), seed=config.seed, level=level.number, steps=STEPS
        )
        return _nll(model, weights, x, y)

    def nll(posterior: Posterior, net: Sites) -> float:
        model.load_net_state(net)
        return nll_at(posterior.loc)

    def free_energy(posterior: Posterior, net: Sites) -> float:
        assert posterior.scale is not None
        model.load_net_state(net)
        with seeds.rng("cpu", config.seed, "barrier"):
            draws = [
                {n: v + posterior.scale[n] * torch.randn_like(v) for n, v in posterior.loc.items()}
                for _ in range(DRAWS)
            ]
        kl = math.fsum(diagnostics.kl_per_site(model, posterior, alive).values())
        return sum(map(nll_at, draws)) / DRAWS + model.kl_temperature * kl / model.num_data

    ends = [(each.posterior, each.load_model().model.net_state()) for each in (before, level)]
    # The KL of a weight that was pruned in between ends with it, so that only one end would have it.
    alive = {n: s > 0 for n, s in (level.posterior.scale or {}).items()}
    heights = nothing | {"barrier_nll": diagnostics.barrier(ends[0], ends[1], nll, POINTS).height}
    if all(posterior.scale is not None and _is_product(network.guide, posterior) for posterior, _ in ends):
        heights["barrier_free_energy"] = diagnostics.barrier(ends[0], ends[1], free_energy, POINTS).height
    return heights


@torch.no_grad()
def _nll(model: BayesianNetwork, weights: Sites, x: Any, y: Tensor) -> float:
    with evaluating(model), model.with_weights(weights, masks.nonzero(weights)):
        output = model.outputs(x)
        likelihood = model.checked_likelihood(output, len(output))
        return -float(likelihood.log_prob(model.checked_targets(y, likelihood, output)).mean())


def parser() -> Parser:
    """The command line."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders; tables are about the first, the others are other seeds of it",
    )
    parser.add_argument("--levels", type=int, nargs="+", help="levels to look at; default: all finished levels")
    parser.add_argument(
        "--no-barriers", action="store_true", help="leave out the barriers, which take most of the time"
    )
    parser.add_argument("--data-dir", help="folder with the run's data; default: the run's own --data-dir")
    parser.add_trust_option()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)

    def work() -> None:
        run, *others = [load_run(path, given.trust_code) for path in given.runs]
        tables = diagnose(run, others, given.levels, barriers=not given.no_barriers, data_dir=given.data_dir)
        for row in tables["diagnosis"]:
            shown = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items() if not math.isnan(value)]
            print(", ".join(shown))
        for line in warnings_of(tables):
            print(f"warning: {line}")
        print(f"tables: {run.folder.path / 'evaluation'}")

    return run_command(PROG, work, arguments, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
