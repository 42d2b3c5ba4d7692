"""The kernels in Triton, for float32 on a GPU: each goes over the weights once. The rest is that of ``torch_path``.

Noise is Philox's, keyed by a seed of 63 bits that torch's generator draws on the GPU, so that the host does not wait and a CUDA
graph draws anew at each replay. Without a GPU, Triton's interpreter runs these kernels (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_lottery.kernels.layout import Layout
from pyro_lottery.kernels.torch_path import TINY, Grads, joined, moments, moments_grad, normal

__all__ = ["kl", "moments", "moments_grad", "normal", "perturb", "sample", "sample_grad"]

BLOCK = 1024
"""Numbers of a program."""
CHUNKS = 64
"""Programs that a site's KL is divided among. The value is fixed, so that the order of sums is."""


@triton.jit
def _sample(loc, log_scale, index, seed, dense, kept, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    mu = tl.load(loc + i, mask=ok, other=0.0)
    w = mu + tl.exp(tl.load(log_scale + i, mask=ok, other=0.0)) * tl.randn(tl.load(seed), i)
    tl.store(kept + i, w, mask=ok)
    if MASKED:
        tl.store(dense + tl.load(index + i, mask=ok, other=0), w, mask=ok)


@triton.jit
def _kl(loc, log_scale, starts, m, s, out, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    site, chunk = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(starts + site) + chunk * BLOCK, tl.load(starts + site + 1)
    centre, width = tl.load(m + site), tl.load(s + site)
    rate, constant = 0.5 / (width * width), tl.log(width) - 0.5
    total = tl.zeros((BLOCK,), tl.float32)
    while first < end:
        i = first + tl.arange(0, BLOCK)
        ok = i < end
        x = tl.load(log_scale + i, mask=ok, other=0.0)
        far = tl.load(loc + i, mask=ok, other=0.0) - centre
        total += tl.where(ok, rate * (tl.exp(2 * x) + far * far) - x + constant, 0.0)
        first += BLOCK * CHUNKS
    tl.store(out + site * CHUNKS + chunk, tl.sum(total))


@triton.jit
def _sample_grad(  # type: ignore[no-untyped-def]
    g, w, loc, log_scale, site, m, s, weight, g_loc, g_log_scale, n, KL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    mu = tl.load(loc + i, mask=ok, other=0.0)
    of_loc = tl.load(g + i, mask=ok, other=0.0)
    of_log_scale = of_loc * (tl.load(w + i, mask=ok, other=0.0) - mu)
    if KL:
        k = tl.load(site + i, mask=ok, other=0)
        width, factor = tl.load(s + k, mask=ok, other=1.0), tl.load(weight + k, mask=ok, other=0.0)
        rate = factor / (width * width)
        of_loc += rate * (mu - tl.load(m + k, mask=ok, other=0.0))
        of_log_scale += rate * tl.exp(2 * tl.load(log_scale + i, mask=ok, other=0.0)) - factor
    tl.store(g_loc + i, of_loc, mask=ok)
    tl.store(g_log_scale + i, of_log_scale, mask=ok)


@triton.jit
def _perturb(mean, variance, seed, out, rate, n, TINY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    v = tl.load(variance + i, mask=ok, other=0.0).to(tl.float32)
    constant = v < TINY  # False for NaN, which stays NaN
    root, noise = tl.sqrt(v), tl.randn(tl.load(seed), i)
    y = tl.load(mean + i, mask=ok, other=0.0).to(tl.float32) + tl.where(constant, 0.0, root * noise)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=ok)
    slope = tl.where(constant, 0.0, 0.5 * noise / tl.where(constant, 1.0, root))
    tl.store(rate + i, slope.to(rate.dtype.element_ty), mask=ok)


def sample(layout: Layout, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sample of all weights [total], and its kept ones [kept]: loc + exp(log_scale)·ε where kept, 0 elsewhere."""
    kept = torch.empty_like(loc)
    dense = kept if layout.index is None else loc.new_zeros(layout.total)
    index = loc if layout.index is None else layout.index
    _launch(
        _sample,
        _programs(loc),
        loc,
        log_scale,
        index,
        _seed(loc),
        dense,
        kept,
        len(loc),
        MASKED=layout.index is not None,
    )
    return dense, kept


def kl(layout: Layout, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Return KL(N(loc, scale²) ‖ N(m, s²)) summed over each site, [sites]."""
    parts = loc.new_empty(len(layout.kept), CHUNKS)
    _launch(_kl, (len(layout.kept), CHUNKS), loc, log_scale, layout.begins(loc.device), m, s, parts, CHUNKS=CHUNKS)
    return parts.sum(1)


def sample_grad(
    layout: Layout, g: Grads, w: Tensor, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of loc and log_scale, given those of every site's sample (``g``) and KL (``weight`` [sites])."""
    g_loc, g_log_scale = torch.empty_like(loc), torch.empty_like(loc)
    _launch(
        _sample_grad, _programs(loc), joined(layout, g, loc), w, loc, log_scale, layout.site(loc.device), m, s,
        m if weight is None else weight.contiguous(), g_loc, g_log_scale, len(loc), KL=weight is not None,
    )  # fmt: skip
    return g_loc, g_log_scale


def perturb(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean + √variance·ε and its derivative by the variance, ε / (2√variance), which is 0 where the variance is 0.

    Both arguments have the same strides.
    """
    out, rate = torch.empty_like(mean), torch.empty_like(mean)
    _launch(_perturb, _programs(mean), mean, variance, _seed(mean), out, rate, mean.numel(), TINY=TINY)
    return out, rate


def _programs(values: Tensor) -> tuple[int, ...]:
    return (-(-values.numel() // BLOCK),)


def _launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    device = arguments[0].device
    if programs[0]:
        with (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        ):  # Triton launches on the current one
            kernel[programs](*arguments, BLOCK=BLOCK, **constants)


def _seed(like: Tensor) -> Tensor:
    return torch.randint(2**63 - 1, (), device=like.device)
