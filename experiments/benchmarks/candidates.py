"""The ways to take a training step that the benchmark compares: ours, plain PyTorch, stock Pyro and other libraries."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_lottery as pl
from experiments.benchmarks.timing import Step
from pyro_lottery import guides, kernels, masks, training
from pyro_lottery.kernels import native
from pyro_lottery.machine import autocast

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


def deterministic(net: nn.Module, x: Tensor, y: Tensor, precision: str, plain: bool) -> Step:
    """Cross-entropy and Adam on the ordinary network."""
    net.to(x.device)
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


def stock(net: nn.Module, x: Tensor, y: Tensor, precision: str) -> Step:
    """Pyro's AutoNormal and Trace_ELBO on our model, called as in Pyro's SVI, with one Adam for all parameters."""
    model = classifier(net).to(x.device)
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
    net: nn.Module, x: Tensor, y: Tensor, precision: str, estimator: str, samples: int, path: str, density: float
) -> Step:
    """The step that :func:`pyro_lottery.train` takes with a mean-field guide, or with a point for ``estimator="point"``."""
    point = estimator == "point"
    model = classifier(net, pl.priors.flat() if point else None).to(x.device, memory_format=torch.channels_last)
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


def classifier(net: nn.Module, prior: Any = None) -> pl.BayesianClassifier:
    return pl.BayesianClassifier(net, prior, num_data=NUM_DATA, kl_temperature=TEMPERATURE)


def peer(name: str, arch: str, x: Tensor, y: Tensor, precision: str) -> Step:
    """One weight sample with another library, on its own version of the same network, in channels_last too."""
    from experiments.benchmarks import peers  # an optional dependency

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
    """All candidates for ``arch``, by name."""

    def net() -> nn.Module:
        return pl.create_model(arch, num_classes=10)

    found = {
        "det": deterministic(net(), x, y, precision, plain=False),
        "plain": deterministic(net(), x, y, precision, plain=True),
        "stock Pyro": stock(net(), x, y, precision),
    }
    for name, options in OURS.items():
        # Ten samples are in the variance alone.
        if options[1] == 1 and ("compiled" not in options or has_compiled(x.device)):
            found[name] = ours(net(), x, y, precision, *options)
    if with_peers:
        found |= {name: peer(name, arch, x, y, precision) for name in PEERS}
    return found


def has_compiled(device: torch.device) -> bool:
    """Whether the C kernels run on this device."""
    return native.problem() is None and device.type == "cpu"
