"""Time of each kernel alone: in C, in plain torch, and by torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from experiments.benchmarks.timing import Step, ratio_rows, time_steps
from pyro_lottery import kernels
from pyro_lottery.kernels import compiled, native, torch_path


def kernel_rows(count: int, rounds: int) -> list[dict[str, Any]]:
    """Each kernel on ``count`` weights: C, plain torch, and torch.compile for noise and samples."""
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
        ways = {"torch": step} | ({"C": of(compiled)[name]} if native.problem() is None else {})
        ways |= {"torch.compile": inductor[name]} if name in inductor else {}
        rows += ratio_rows(name, count, "32", time_steps(ways, rounds, loc.device), "torch")
    return rows
