"""Question: what does a Bayesian training step cost, beside a deterministic one and beside other libraries?

Takes turns: in every round each candidate does one training step on the same network and batch of random images, so
that whatever else happens on the machine happens to all. ``det`` is the deterministic step at its fastest here
(channels_last, fused Adam, the same precision); ``plain`` is what a user writes first (fp32, NCHW, unfused Adam). With
``--run RUN`` also the variance of every estimator's gradient at that run's trained dense network, one batch held
fixed, and the efficiency 1 / (time × variance).

``--evaluate`` and ``--kernels`` add predictions and the kernels alone. Writes ``OUT/steps.csv``, ``variance.csv``,
``evaluation.csv`` and ``kernels.csv`` and prints them as Markdown; ``python -m plots.speed OUT`` draws them.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_lottery as pl
from experiments.study.markdown import markdown_table
from pyro_lottery import files, guides, kernels, machine, masks, training
from pyro_lottery.errors import UserError
from pyro_lottery.kernels import compiled, torch_path
from pyro_lottery.machine import autocast, channels_last, resolve_device, resolve_precision

Step = Callable[[], Any]
BATCH = {"resnet20": 128, "resnet18": 32, "vgg11": 64, "vit_tiny": 32}
NUM_DATA, TEMPERATURE, LR, DENSITY = 50_000, 0.1, 1e-3, 0.012
OURS = {
    "our deterministic guide": ("point", 1, "auto", 1.0),
    "one weight sample, compiled": ("weights", 1, "compiled", 1.0),
    "one weight sample, pure torch": ("weights", 1, "torch", 1.0),
    "local, compiled": ("local", 1, "compiled", 1.0),
    "local, pure torch": ("local", 1, "torch", 1.0),
    "ten weight samples": ("weights", 10, "auto", 1.0),
    f"one weight sample at {100 * DENSITY:g} %, compiled": ("weights", 1, "compiled", DENSITY),
    f"one weight sample at {100 * DENSITY:g} %, pure torch": ("weights", 1, "torch", DENSITY),
}
PEERS = ("bayesian-torch", "torch-blue, sampled KL", "torch-blue, analytic KL")


def deterministic(arch: str, x: Tensor, y: Tensor, precision: str, plain: bool) -> Step:
    """Cross-entropy and Adam on the ordinary network."""
    net = pl.create_model(arch, num_classes=10).to(x.device)
    if plain:
        x, precision = x.contiguous(), "32"
    else:
        net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), LR, fused=not plain)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(x.device, precision):
            output = net(x)
        F.cross_entropy(output.float(), y).backward()
        optimizer.step()

    return step


def stock(arch: str, x: Tensor, y: Tensor, precision: str) -> Step:
    """Pyro's own AutoNormal and Trace_ELBO on our model, as its SVI calls them, with one Adam for all parameters."""
    model = _model(arch).to(x.device)
    guide = pl.guides.auto(AutoNormal, model)

    def cast(*args: Any, **kwargs: Any) -> Any:
        with autocast(x.device, precision):
            return model(*args, **kwargs)

    elbo, optimizer = Trace_ELBO(), torch.optim.Adam([*guide.parameters(), *model.parameters()], LR)

    def step() -> None:
        optimizer.zero_grad()
        elbo.loss_and_grads(cast, guide, x, y)
        optimizer.step()

    return step


def ours(
    arch: str, x: Tensor, y: Tensor, precision: str, estimator: str, samples: int, path: str, density: float
) -> Step:
    """The step that :func:`pyro_lottery.train` takes with a mean-field guide, or with a point for ``estimator="point"``."""
    point = estimator == "point"
    model = _model(arch, pl.priors.flat() if point else None).to(x.device, memory_format=torch.channels_last)
    guide = (pl.guides.deterministic if point else pl.guides.mean_field)(model)
    full = masks.full(pl.posterior(guide))
    mask = {site: torch.rand(m.shape, device=m.device) < density for site, m in full.items()} if density < 1 else {}
    sparsify = pl.handlers.sparsify(mask)
    with sparsify:
        guide.compress_()
    optimizer = torch.optim.Adam(guides.parameter_groups(model, guide, 1e-4), LR, fused=True)
    elbo, sums = pl.ELBO(estimator="weights" if point else estimator), torch.zeros(5, device=x.device)

    def step() -> None:
        with kernels.using(path), sparsify:
            training.step(model, guide, elbo, optimizer, x, y, samples=samples, precision=precision, sums=sums)

    return step


def _model(arch: str, prior: Any = None) -> pl.BayesianClassifier:
    net = pl.create_model(arch, num_classes=10)
    return pl.BayesianClassifier(net, prior, num_data=NUM_DATA, kl_temperature=TEMPERATURE)


def peer(name: str, arch: str, x: Tensor, y: Tensor, precision: str) -> Step:
    """One weight sample with another library, on its own version of the same network, in channels_last too."""
    from experiments.benchmarks import peers

    net = pl.create_model(arch, num_classes=10).to(memory_format=torch.channels_last)

    def context() -> Any:
        return autocast(x.device, precision)

    if name == "bayesian-torch":
        return peers.bayesian_torch_step(net, x, y, NUM_DATA, context)
    kl = "analytic" if "analytic" in name else "sampled"
    return peers.torch_blue_step(net, x, y, NUM_DATA, kl, context)


def has_peers() -> bool:
    """Whether the other libraries are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch_blue", "bayesian_torch"))


def candidates(arch: str, x: Tensor, y: Tensor, precision: str, with_peers: bool) -> dict[str, Step]:
    """Every way to train ``arch`` that is compared."""
    found = {
        "det": deterministic(arch, x, y, precision, plain=False),
        "plain": deterministic(arch, x, y, precision, plain=True),
        "stock Pyro": stock(arch, x, y, precision),
    }
    for name, options in OURS.items():
        if options[1] == 1 and ("compiled" not in options or _has_compiled(x.device)):  # ten samples: see the variance
            found[name] = ours(arch, x, y, precision, *options)
    if with_peers:
        found |= {name: peer(name, arch, x, y, precision) for name in PEERS}
    return found


def time_steps(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step: one step each in turn, ``rounds`` times, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio_rows(
    arch: str, batch: int, precision: str, seconds: dict[str, list[float]], reference: str
) -> list[dict[str, Any]]:
    """One row a candidate: the median step and the ratio to ``reference`` in the same round (median, least, greatest)."""
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        rows.append(
            {
                "arch": arch, "batch": batch, "precision": precision, "candidate": name, "rounds": len(own),
                "step_ms": 1000 * statistics.median(own), "ratio": statistics.median(ratios), "least": min(ratios),
                "greatest": max(ratios),
            }
        )  # fmt: skip
    return rows


def variance_rows(path: str, batch: int, draws: int, precision: str, device: torch.device) -> list[dict[str, Any]]:
    """Trace of the covariance of the gradient of all locs and of all log-scales, per estimator, at a trained state."""
    run = pl.load_run(path)
    trained = run.level(0).load_model(device)
    model, guide, data = trained.model, trained.guide, run.load_data(device)
    if not isinstance(guide, guides.MeanField):
        raise UserError(f"--run {path} has a {type(guide).__name__} guide; the variance is measured on mean_field")
    x, y = channels_last(data.train[:batch]), data.train.labels[:batch]
    model.train()
    rows: list[dict[str, Any]] = []
    for name, (estimator, samples, kernel_path, density) in OURS.items():
        if estimator == "point" or density < 1 or kernel_path == ("torch" if _has_compiled(device) else "compiled"):
            continue
        elbo, seconds = pl.ELBO(estimator=estimator), []
        mean = {"loc": torch.zeros_like(guide.loc), "log_scale": torch.zeros_like(guide.log_scale)}
        spread = {key: torch.zeros_like(value) for key, value in mean.items()}
        for draw in range(1, draws + 1):
            _wait(device)
            began = time.perf_counter()
            guide.zero_grad()
            for sample in range(samples):
                with kernels.using(kernel_path), autocast(device, precision):
                    terms = elbo.terms(model, guide, x, y, closed_forms=0 if sample else samples)
                ((terms.nll + terms.kl) / (model.num_data * samples)).backward()
            _wait(device)
            seconds.append(time.perf_counter() - began)
            for key in mean:  # Welford's update: the noise may be far smaller than the mean
                grad = getattr(guide, key).grad
                before = grad - mean[key]
                mean[key] += before / draw
                spread[key] += before * (grad - mean[key])
        row: dict[str, Any] = {"arch": run.config.arch, "batch": batch, "precision": precision, "candidate": name}
        row |= {"draws": draws, "ms": 1000 * statistics.median(seconds)}
        rows.append(row | {key: float(value.sum()) / (draws - 1) for key, value in spread.items()})
    one = rows[0]
    for row in rows:
        for key in ("loc", "log_scale"):
            row[f"{key}_ratio"] = row[key] / one[key]
            row[f"{key}_efficiency"] = one["ms"] * one[key] / (row["ms"] * row[key])
    return rows


def _has_compiled(device: torch.device) -> bool:
    return compiled.problem() is None and device.type == "cpu"


def evaluation_rows(arch: str, images: Tensor, samples: int, rounds: int, precision: str) -> list[dict[str, Any]]:
    """Class probabilities of all images from ``samples`` weight samples: ours, and the loop a user writes first
    (fp32, NCHW, plain weights loc + scale·ε put into the plain network).
    """
    net = pl.create_model(arch, num_classes=10).to(images.device).eval()
    model = _model(arch).to(images.device, memory_format=torch.channels_last)
    guide = pl.guides.mean_field(model)
    posterior = pl.posterior(guide)
    loc, scale = ({n: v.contiguous() for n, v in p.items()} for p in (posterior.loc, posterior.scale or {}))

    usual = [part.contiguous() for part in images.split(500)]

    @torch.no_grad()
    def plain() -> Tensor:
        total = torch.zeros(len(images), 10, device=images.device)
        for _ in range(samples):
            weights = {name: value + scale[name] * torch.randn_like(value) for name, value in loc.items()}
            parts = [torch.func.functional_call(net, weights, part) for part in usual]
            total += torch.cat(parts).softmax(-1)
        return total / samples

    loops = {
        "plain fp32 loop": plain,
        "predict": lambda: pl.predict(model, guide, images, samples, precision=precision),
    }
    seconds = time_steps(loops, rounds, images.device)
    return ratio_rows(arch, len(images), precision, seconds, "plain fp32 loop")


def kernel_rows(count: int, rounds: int) -> list[dict[str, Any]]:
    """Each kernel on ``count`` weights: C, plain torch, and for noise and samples what torch.compile makes of them."""
    layout = kernels.Layout([torch.Size((count,))])
    loc, log_scale = torch.randn(count), torch.randn(count) - 5
    m, s, weight = torch.zeros(1), torch.ones(1), torch.ones(1)
    w, g = torch.randn(count), [torch.randn(count)]

    def of(path: Any) -> dict[str, Step]:
        return {
            "noise": lambda: path.normal(count, loc),
            "sample": lambda: path.sample(layout, loc, log_scale),
            "KL": lambda: path.kl(layout, loc, log_scale, m, s),
            "gradients of sample and KL": lambda: path.sample_grad(layout, g, w, loc, log_scale, m, s, weight),
            "perturb, with copy and exp": lambda: path.perturb(loc.clone(), log_scale.exp()),
        }

    compiled_noise = torch.compile(torch.randn_like)
    compiled_sample = torch.compile(lambda a, b: a + b.exp() * torch.randn_like(a))
    inductor = {"noise": lambda: compiled_noise(loc), "sample": lambda: compiled_sample(loc, log_scale)}
    rows = []
    for name, step in of(torch_path).items():
        ways = {"torch": step} | ({"C": of(compiled)[name]} if compiled.problem() is None else {})
        ways |= {"torch.compile": inductor[name]} if name in inductor else {}
        rows += ratio_rows(name, count, "32", time_steps(ways, rounds, loc.device), "torch")
    return rows


def markdown(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """The chosen columns of ``rows`` as a Markdown table."""
    return "\n".join(markdown_table(list(columns), ([text.format(**row) for text in columns.values()] for row in rows)))


STEP_COLUMNS = {
    "network": "{arch}, B {batch}", "precision": "{precision}", "step": "{candidate}", "ms": "{step_ms:.0f}",
    "ratio to det": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
EVALUATION_COLUMNS = {
    "network": "{arch}, {batch} images", "precision": "{precision}", "evaluation": "{candidate}", "ms": "{step_ms:.0f}",
    "ratio to the loop": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
KERNEL_COLUMNS = {
    "kernel": "{arch}", "weights": "{batch:,}", "made by": "{candidate}", "ms": "{step_ms:.1f}",
    "ratio to torch": "{ratio:.2f} ({least:.2f} to {greatest:.2f})",
}  # fmt: skip
VARIANCE_COLUMNS = {
    "network": "{arch}, B {batch}", "estimator": "{candidate}", "ms": "{ms:.0f}", "variance of loc's gradient": "{loc_ratio:.3f}",
    "of log-scale's": "{log_scale_ratio:.3f}", "efficiency, loc": "{loc_efficiency:.2f}", "log-scale": "{log_scale_efficiency:.2f}",
}  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, pd.DataFrame(rows).to_csv(index=False).encode())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.steps", description=__doc__)
    parser.add_argument("--arch", nargs="*", default=list(BATCH), help="networks; default: " + " ".join(BATCH))
    parser.add_argument("--batch-size", type=int, help="default: 128 for resnet20, 64 for vgg11, else 32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="auto", help="32, bf16 or auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peers", action="store_true", help="also torch-blue and bayesian-torch (extra bench)")
    parser.add_argument("--evaluate", type=int, default=0, help="also ten posterior samples over so many images")
    parser.add_argument("--kernels", type=int, default=0, help="also each kernel alone, on so many weights")
    parser.add_argument("--run", help="run folder of a mean_field run, for the gradient's variance")
    parser.add_argument("--draws", type=int, default=100, help="gradients per estimator for the variance")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--out", default="runs/speed")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given = parser().parse_args(arguments)
    if given.peers and not has_peers():
        parser().error("--peers needs the extra bench: pip install -e '.[bench]'")
    device = resolve_device(given.device)
    precision = resolve_precision(given.precision, device)
    pyro.enable_validation(False)
    machine.keep_memory()  # for every candidate, so that none is slow for the want of it
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.python_version()}\n")
    rows: list[dict[str, Any]] = []
    evaluated: list[dict[str, Any]] = []
    for arch in given.arch:
        torch.manual_seed(0)
        batch = given.batch_size or BATCH.get(arch, 32)
        x = channels_last(torch.randn(batch, 3, given.image_size, given.image_size, device=device))
        y = torch.randint(0, 10, (batch,), device=device)
        steps = candidates(arch, x, y, precision, given.peers)
        new = ratio_rows(arch, batch, precision, time_steps(steps, given.rounds, device), "det")
        rows += new
        write(Path(given.out) / "steps.csv", rows)
        print(markdown(new, STEP_COLUMNS), end="\n\n", flush=True)
        if given.evaluate:
            images = channels_last(torch.randn(given.evaluate, 3, given.image_size, given.image_size, device=device))
            evaluated += evaluation_rows(arch, images, 10, given.rounds, precision)
            write(Path(given.out) / "evaluation.csv", evaluated)
    if evaluated:
        print(markdown(evaluated, EVALUATION_COLUMNS), end="\n\n", flush=True)
    if given.kernels:
        table = kernel_rows(given.kernels, given.rounds)
        write(Path(given.out) / "kernels.csv", table)
        print(markdown(table, KERNEL_COLUMNS), end="\n\n", flush=True)
    if given.run:
        variance = variance_rows(given.run, given.batch_size or 128, given.draws, precision, device)
        write(Path(given.out) / "variance.csv", variance)
        print(markdown(variance, VARIANCE_COLUMNS))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
