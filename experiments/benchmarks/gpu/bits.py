"""Is a GPU's result that of the CPU, and a graph's that of ordinary steps?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import pyro_lottery as pl
from experiments.benchmarks import tape
from experiments.benchmarks.gpu.day import ESTIMATORS, Checks, Day, held
from pyro_lottery import kernels, machine, seeds
from pyro_lottery.handlers import sparsify
from pyro_lottery.kernels import torch_path
from pyro_lottery.machine import channels_last
from pyro_lottery.training import loop

LIMITS = {"32": 2e-4, "tf32": 2e-2}
"""Greatest relative difference of a GPU's gradients from those of the CPU."""


def correct(day: Day) -> Checks:
    """The same weights and noise on CPU and GPU: the same loss and gradients; Triton's kernels beside torch's."""
    for arch in day.archs:
        for estimator in ESTIMATORS:
            for density in (1.0, 0.05):
                reference = _gradients(day, arch, estimator, density, "32", torch.device("cpu"))
                for precision in day.precisions:
                    found = _gradients(day, arch, estimator, density, precision, day.device)
                    name = f"CPU = GPU, {arch}, {estimator} at {density:g}, {precision}"
                    if precision in LIMITS:
                        far = max(
                            float((a - b).norm() / (a.norm() + 1e-12)) for a, b in zip(reference, found, strict=True)
                        )
                        yield held(name, far < LIMITS[precision], f"{far:.1e}", f"< {LIMITS[precision]:g}")
                    else:  # gradients of an untrained network are chaotic in bf16
                        nll = float((found[0] - reference[0]).abs() / reference[0].abs())
                        yield held(f"{name}, nll", nll < 0.1, f"{nll:.1e}", "< 0.1")
    if not day.dry:
        yield from _triton(day)


def _gradients(
    day: Day, arch: str, estimator: str, density: float, precision: str, device: torch.device
) -> list[Tensor]:
    model, guide = day.network(arch, estimator)
    mask = {name: torch.rand(value.shape) < density for name, value in model.initial_values().items()}
    x, y = channels_last(torch.randn(16, 3, day.size, day.size)), torch.randint(0, 10, (16,))
    model.to(device, memory_format=torch.channels_last)
    guide.to(device)
    noise = torch.Generator().manual_seed(9)
    usual = torch_path.normal
    torch_path.normal = lambda count, like: torch.randn(count, generator=noise).to(like)  # the CPU's, on both
    elbo = pl.ELBO(estimator="weights" if estimator == "point" else estimator)
    try:
        with kernels.using("torch"), sparsify(mask if density < 1 else {}), machine.autocast(device, precision):
            terms = elbo.terms(model, guide, x.to(device), y.to(device))
        with machine.products(device, precision):
            ((terms.nll + terms.tempered_kl) / model.num_data).backward()
    finally:
        torch_path.normal = usual
    found = [terms.nll, terms.tempered_kl, *(p.grad for p in guide.parameters() if p.grad is not None)]
    return [value.detach().double().cpu() for value in found]


def _triton(day: Day) -> Checks:
    triton = kernels.backend(torch.zeros(1, device=day.device))
    yield held("Triton's kernels are used", triton.__name__.endswith("triton_path"), triton.__name__)
    shapes = [torch.Size(s) for s in ((64, 32, 3, 3), (10, 64), (10,))]
    for density in (1.0, 0.3):
        masks = [torch.rand(s) < density for s in shapes] if density < 1 else ()
        layout = kernels.Layout(shapes, masks, day.device)
        loc, log_scale, w = (torch.randn(layout.offsets[-1], device=day.device) - shift for shift in (0, 4, 0))
        m, s, weight = (torch.rand(3, device=day.device) + 0.5 for _ in range(3))
        g = [torch.randn(count, device=day.device) for count in layout.kept]
        ours, theirs = (
            (b.kl(layout, loc, log_scale, m, s), *b.sample_grad(layout, g, w, loc, log_scale, m, s, weight))
            for b in (triton, torch_path)
        )
        far = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
        yield held(f"Triton = torch at {density:g}", far < 1e-5, f"{far:.1e}", "< 1e-5")
        same = torch.equal(triton.kl(layout, loc, log_scale, m, s), ours[0])
        yield held(f"Triton's KL repeats its bits at {density:g}", same)
    layout, zeros = kernels.Layout([torch.Size((4_000_000,))]), torch.zeros(4_000_000, device=day.device)
    z = triton.sample(layout, zeros, zeros)[1].double()
    moments = [float((z**power).mean()) for power in (1, 2, 4)]
    near = all(abs(a - b) < 5 * (v / len(z)) ** 0.5 for a, b, v in zip(moments, (0, 1, 3), (1, 2, 96), strict=True))
    yield held("Triton's noise", near, " ".join(f"{value:.4f}" for value in moments), "0 1 3")


def graphs(day: Day) -> Checks:
    """Training by replayed steps ends with the bits of ordinary steps, with deterministic algorithms."""
    pixels, labels = (
        torch.randint(0, 256, (10 * day.batch, 3, day.size, day.size)).byte(),
        torch.arange(10 * day.batch) % 10,
    )
    data = pl.data.from_tensors(pixels, labels, pixels[:20], labels[:20], augment="none")
    for arch in day.archs:
        for estimator in ESTIMATORS:
            for precision in day.precisions:
                found = []
                for choice in ("off", "on"):
                    with seeds.algorithms(deterministic=True), _tape(day, choice), kernels.using(day.path):
                        found.append(_trained(day, arch, estimator, precision, data, choice))
                different = [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]
                name = f"graph = ordinary steps, {arch}, {estimator}, {precision}"
                yield held(name, not different, different[:3] or "the same bits")


def _trained(day: Day, arch: str, estimator: str, precision: str, data: Any, choice: str) -> dict[str, Tensor]:
    model, guide = day.network(arch, estimator, len(data.train))
    model.to(day.device)
    guide.to(day.device)
    options: dict[str, Any] = {"epochs": 2, "milestones": (1,), "batch_size": day.batch, "precision": precision}
    options |= {"estimator": "local" if estimator == "local" else "weights", "graph": "off" if day.dry else choice}
    pl.train(model, guide, data, **options)
    return {**guide.state_dict(), **model.state_dict()}


@contextmanager
def _tape(day: Day, choice: str) -> Iterator[None]:
    """Within this context of a dry day, steps are recorded by a tape, or refused as on a GPU without graphs."""

    def record(work: Callable[[], None], optimizer: Any) -> Callable[[], None]:
        if choice == "off":
            raise RuntimeError("off")
        return tape.record(work, optimizer)

    usual: Any = loop.recorder
    if day.dry:
        loop.recorder = lambda *of: record
    try:
        with warnings.catch_warnings():
            if choice == "off":
                warnings.filterwarnings("ignore", message="--graph")  # says that nothing is recorded
            yield
    finally:
        loop.recorder = usual
