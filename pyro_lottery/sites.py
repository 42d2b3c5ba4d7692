"""Lists the random and deterministic parameters of a network: ``python -m pyro_lottery.sites --arch resnet20``.

For each site it prints the name, shape, prior, guide and initial scale, and then about how much memory training takes. With ``--run-dir``, the network is that of a run, and
it prints how the run's pruned layers were computed, sparse or dense (see ``--sparse``).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pyro_lottery import data, guides, training
from pyro_lottery.distributions import base
from pyro_lottery.errors import UserError
from pyro_lottery.levels import WHOLE
from pyro_lottery.machine import channels_last
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.runs.build import Shape, build, check_names, load_data, shape_of
from pyro_lottery.runs.cli import Parser, run_command
from pyro_lottery.runs.config import Config, preset
from pyro_lottery.runs.folder import RunFolder
from pyro_lottery.runs.loaded import load_run
from pyro_lottery.runs.options import dashed
from pyro_lottery.runs.presets import PRESET_HELP

PROG = "python -m pyro_lottery.sites"
OPTIONS = (
    "arch", "patch_size", "dataset", "data_dir", "image_size", "guide", "prior", "prior_scale", "init_scale", "seed", "batch_size",
    "estimator",
)  # fmt: skip


def describe(model: BayesianNetwork, guide: Any) -> list[dict[str, Any]]:
    """One row per site, in the network's order.

    Its keys are ``site``, ``shape``, ``weights`` (their number), ``prunable``, ``prior``, ``guide``, and ``scale``, the mean
    scale of the site's weights in ``guide``, which in a new guide is the initial one; None for a point guide.
    """
    posterior = guides.posterior(guide)
    return [
        {
            "site": site,
            "shape": tuple(loc.shape),
            "weights": loc.numel(),
            "prunable": site in model.prunable,
            "prior": _prior(model, site),
            "guide": type(guide).__name__,
            "scale": None if posterior.scale is None else float(posterior.scale[site].mean()),
        }
        for site, loc in ((site, posterior.loc[site]) for site in model.sites)
    ]


def deterministic(model: BayesianNetwork) -> list[dict[str, Any]]:
    """One row per deterministic parameter, in the network's order.

    Its keys are ``name``, ``shape``, ``weights`` (their number), ``layer`` (its class) and ``trained``, False if it is frozen.
    """
    learned = {id(p) for p in model.prior_parameters()}
    return [
        {
            "name": name,
            "shape": tuple(parameter.shape),
            "weights": parameter.numel(),
            "layer": type(model.net.get_submodule(name.rpartition(".")[0])).__name__.removeprefix("Pyro"),
            "trained": parameter.requires_grad,
        }
        for name, parameter in model.net.named_parameters()
        if id(parameter) not in learned
    ]


def _prior(model: BayesianNetwork, site: str) -> str:
    return _text(model.prior_of(site)) if site in model.independent_sites else "depends on other sites"


def _text(each: Any) -> str:
    each = base(each)
    if isinstance(each, torch.distributions.MixtureSameFamily):
        shares = " ".join(f"{share:.4g}" for share in each.mixture_distribution.probs.flatten().tolist()[:4])
        return f"mixture({shares}) of {_text(each.component_distribution)}"
    numbers = {n: getattr(each, n) for n in each.arg_constraints if isinstance(getattr(each, n, None), torch.Tensor)}
    return f"{type(each).__name__}({', '.join(f'{n} {_range(t)}' for n, t in numbers.items())})"


def _range(values: torch.Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _shape(config: Config) -> Shape:
    if config.dataset in data.DOWNLOADS:  # the shape is known without the images
        count, _, classes = data.DOWNLOADS[config.dataset]
        size = config.image_size or 32
        return Shape(classes, 3, (size, size), count, 0)
    return shape_of(load_data(config, torch.device("cpu")))


def show(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]] = (), scale: str = "initial scale") -> None:
    """Print the sites as a table, the numbers of random and prunable weights, and the deterministic parameters.

    ``scale`` is the header of the scales.
    """
    table = Table("site", "shape", "weights", "prunable", "prior", "guide", scale, box=None, header_style="bold")
    for row in rows:
        table.add_row(
            row["site"], "×".join(map(str, row["shape"])), f"{row['weights']:,}", "yes" if row["prunable"] else "",
            row["prior"], row["guide"], "" if row["scale"] is None else f"{row['scale']:.4g}",
        )  # fmt: skip
    _print(table)
    prunable = [row["weights"] for row in rows if row["prunable"]]
    total = sum(row["weights"] for row in rows)
    print(
        f"{len(rows)} sites, {total:,} random weights; {len(prunable)} prunable sites, {sum(prunable):,} prunable weights"
    )
    if not others:
        return
    table = Table("deterministic", "shape", "weights", "layer", "", box=None, header_style="bold")
    for row in others:
        shape = "×".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, f"{row['weights']:,}", row["layer"], "" if row["trained"] else "frozen")
    print()
    _print(table)
    print(f"{len(others)} parameters stay deterministic, {sum(row['weights'] for row in others):,} weights")


def show_layers(run: RunFolder) -> None:
    """Print the numbers of sparse and dense pruned layers of each finished level of ``run``, and each layer of the last level.

    A layer counts once for each batch size, and once in training and once in predictions. Levels of version 0.1.0 have no
    manifest that says how theirs were computed.
    """
    print()
    last: tuple[int, Mapping[str, str]] | None = None
    for row in run.finished():
        manifest = run.level(row.level).manifest()
        if manifest is not None:
            layers = dict(manifest.layers)
            whole = layers.pop(WHOLE, "")
            count = Counter(layers.values())
            print(
                f"level {row.level}, density {row.density:.2%}: {count['sparse']} sparse, {count['dense']} dense"
                + (f"; {WHOLE} are faster {whole}" if whole else "")
            )
            last = row.level, layers
    if last and last[1]:
        table = Table(f"pruned layer of level {last[0]}", "computed", box=None, header_style="bold")
        for what, way in last[1].items():
            table.add_row(what, way)
        _print(table)


def show_memory(config: Config, shape: Shape, model: BayesianNetwork, guide: Any) -> None:
    """Print about how much memory training takes, beside the data."""
    x, y = torch.zeros(4, shape.in_channels, *shape.image_size), torch.arange(4) % (shape.num_classes or 1)
    size = training.step_memory(model, guide, channels_last(x), y, config.batch_size, config.estimator)
    print(f"training with {config.batch_size} examples a batch takes about {size / 2**30:.2f} GiB of memory")


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(PROG, str(__doc__))
    parser.add_argument("--preset", help=PRESET_HELP)
    parser.add_argument("--run-dir", type=Path, help="a run with a finished level, whose network is listed")
    parser.add_trust_option()
    parser.add_options(only=OPTIONS)
    given = vars(parser.parse_args(arguments))

    def work() -> None:
        path, trust_code, name = (given.pop(each) for each in ("run_dir", "trust_code", "preset"))
        if path is not None:
            if more := [*given, *(["preset"] if name else [])]:
                raise UserError(f"--run-dir lists the run's own network; leave out --{dashed(min(more))}")
            run = load_run(path, trust_code)
            level = run.folder.finished()[0].level
            net = run.level(level).load_model()
            show(describe(net.model, net.guide), deterministic(net.model), scale=f"scale after level {level}")
            show_layers(run.folder)
            return
        if trust_code:
            raise UserError("--trust-code is for a run; give --run-dir")
        config = preset(name or "default", **given)
        check_names(config)
        shape = _shape(config)
        model, guide = build(config, shape)
        show(describe(model, guide), deterministic(model))
        show_memory(config, shape, model, guide)

    return run_command(PROG, work, arguments, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
