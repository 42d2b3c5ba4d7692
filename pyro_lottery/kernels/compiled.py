"""The kernels in C, for float32 on the CPU.

Samples by torch.compile took 18 times as long (``python -m experiments.benchmarks.steps --kernels 11000000``). C needs nothing but a
compiler, and noise, exponential and sums are vectorised in one loop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lottery.kernels.layout import Layout
from pyro_lottery.kernels.native import argument, call
from pyro_lottery.kernels.torch_path import Grads, draw_seed

CHUNK = 4096  # must equal CHUNK in kernels.c


def _int64(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _pointers(grads: Grads) -> Any:
    return (ctypes.c_void_p * len(grads))(*(argument(g).value for g in grads))


def _floats(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")  # explicit, since torch's defaults may be others


def normal(count: int, like: Tensor) -> Tensor:
    """Return ``count`` standard normal numbers, float32 [count]."""
    out = _floats(count)
    call("pl_normal", count, out, draw_seed())
    return out


def sample(layout: Layout, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sample of all weights [total], and its kept ones [kept]: loc + exp(log_scale)·ε where kept, 0 elsewhere."""
    kept = torch.empty_like(loc)
    out = kept if layout.index is None else _output(layout, loc)
    call("pl_sample", len(loc), loc, log_scale, layout.index32, out, kept, draw_seed())
    return out, kept


def moments(layout: Layout, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and variances of all weights, [total] each, 0 where not kept."""
    mean, variance = _output(layout, loc), _output(layout, loc)
    call("pl_moments", len(loc), loc, log_scale, layout.index32, mean, variance)
    return mean, variance


def kl(layout: Layout, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Return KL(N(loc, scale²) ‖ N(m, s²)) summed over each site, [sites]."""
    out = _floats(len(layout.kept))
    partial = torch.empty(sum(-(-n // CHUNK) for n in layout.kept), dtype=torch.float64, device="cpu")
    call("pl_kl", len(layout.kept), _int64(layout.offsets), loc, log_scale, m, s, partial, out)
    return out


def sample_grad(
    layout: Layout,
    g: Grads,
    w: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    m: Tensor,
    s: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of loc and log_scale, given those of every site's sample (``g``) and KL (``weight`` [sites]).

    ``w`` is the sample of the kept weights.
    """
    g_loc, g_log_scale = torch.empty_like(loc), torch.empty_like(loc)
    weight = None if weight is None else weight.contiguous()
    call(
        "pl_sample_grad", len(g), _int64(layout.offsets), _pointers(g), w, loc, log_scale, m, s, weight, g_loc, g_log_scale,
    )  # fmt: skip
    return g_loc, g_log_scale


def moments_grad(
    layout: Layout, g_mean: Grads, g_variance: Grads, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of loc and log_scale, given those of every site's mean, variance and KL (``weight`` [sites])."""
    g_loc, g_log_scale = torch.empty_like(loc), torch.empty_like(loc)
    weight = None if weight is None else weight.contiguous()
    call(
        "pl_moments_grad", len(g_mean), _int64(layout.offsets), _pointers(g_mean), _pointers(g_variance), loc, log_scale, m, s,
        weight, g_loc, g_log_scale,
    )  # fmt: skip
    return g_loc, g_log_scale


def perturb(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean + √variance·ε and its derivative by the variance, ε / (2√variance).

    The results overwrite the arguments.
    """
    name = "pl_perturb" if mean.dtype == torch.float32 else "pl_perturb_bf16"
    call(name, mean.numel(), mean, variance, draw_seed())
    return mean, variance


def _output(layout: Layout, like: Tensor) -> Tensor:
    return like.new_empty(layout.total) if layout.index is None else like.new_zeros(layout.total)
