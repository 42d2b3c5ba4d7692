"""Time of predictions from weight samples: ``predict`` beside a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyro_lottery as pl
from experiments.benchmarks.candidates import classifier
from experiments.benchmarks.timing import ratio_rows, time_steps


def evaluation_rows(arch: str, images: Tensor, samples: int, rounds: int, precision: str) -> list[dict[str, Any]]:
    """Class probabilities of all images from ``samples`` weight samples, by ``predict`` and by a plain loop.

    The loop runs the plain network in fp32 and NCHW with weights loc + scale·ε.
    """
    net = pl.create_model(arch, num_classes=10).to(images.device).eval()
    model = classifier(pl.create_model(arch, num_classes=10)).to(images.device, memory_format=torch.channels_last)
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
