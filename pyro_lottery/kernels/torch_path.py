"""The kernels in plain torch operations, for every device and precision. They are the reference for the compiled ones.

m and s are the prior's loc and scale, one number per site; sums run in the order of the sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pyro_lottery import seeds
from pyro_lottery.kernels.layout import Layout

CHUNK = 1 << 20
"""Normal numbers per generator. The value is fixed, so that the numbers do not depend on the number of threads."""
EXACT = 1 << 14
"""Terms that a CPU may add one after the other in single precision."""
TINY = 1e-30
"""Variances below this count as 0. A sum of non-negative terms is that small only if all its terms are 0."""

Grads = Sequence[Tensor | None]


def draw_seed() -> int:
    """Return a 63-bit seed from torch's global generator."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def normal(count: int, like: Tensor) -> Tensor:
    """Return ``count`` standard normal numbers [count] with the device and dtype of ``like``.

    More than ``CHUNK`` numbers on the CPU are computed by several threads.
    """
    if like.device.type != "cpu" or count <= CHUNK:
        return torch.randn(count, device=like.device, dtype=like.dtype)
    return fill_(like.new_empty(count), draw_seed())


def fill_(out: Tensor, seed: int) -> Tensor:
    """Fill ``out`` [count] with standard normal numbers that depend only on ``seed``; each chunk has its own random stream."""

    def fill(start: int) -> None:
        out[start : start + CHUNK].normal_(generator=seeds.generator("cpu", seed, "chunk", start))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, len(out), CHUNK)))
    return out


def sample(layout: Layout, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sample of all weights [total], and its kept ones [kept]: loc + exp(log_scale)·ε where kept, 0 elsewhere."""
    noise = normal(len(loc), loc)
    kept = torch.addcmul(loc, log_scale.exp(), noise, out=noise)
    return layout.scatter(kept), kept


def moments(layout: Layout, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and variances of all weights, [total] each, 0 where not kept."""
    return layout.scatter(loc.clone()), layout.scatter((2 * log_scale).exp_())


def kl(layout: Layout, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Return KL(N(loc, scale²) ‖ N(m, s²)) summed over each site, [sites].

    No loop over sites: on a GPU, each of its operations would be a kernel to launch.
    """
    site, count = layout.site(loc.device), layout.count(loc.device)
    terms = (loc - m.index_select(0, site)).square_().add_((2 * log_scale).exp_())
    terms.mul_(s.pow(-2).mul_(0.5).index_select(0, site)).sub_(log_scale)
    if loc.device.type == "cpu" and len(loc) > EXACT:
        terms = terms.double()  # a CPU adds the terms of a segment one after the other
    sums = torch.segment_reduce(terms, "sum", lengths=count, unsafe=True)
    return sums.addcmul_(s.log() - 0.5, count).to(loc.dtype)


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

    Without the KL: d/dloc = g, d/dlog_scale = g·(w − loc). The noise need not be stored, since scale·ε = w − loc.
    """
    g_loc = joined(layout, g, loc)
    g_log_scale = (w - loc).mul_(g_loc)
    return _add_kl(layout, loc, (2 * log_scale).exp_(), m, s, weight, g_loc, g_log_scale)


def moments_grad(
    layout: Layout, g_mean: Grads, g_variance: Grads, loc: Tensor, log_scale: Tensor, m: Tensor, s: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of loc and log_scale, given those of every site's mean, variance and KL (``weight`` [sites]).

    Without the KL: d/dloc = g_mean, d/dlog_scale = 2·scale²·g_variance.
    """
    variance = (2 * log_scale).exp_()
    g_loc = joined(layout, g_mean, loc)
    g_log_scale = joined(layout, g_variance, loc).mul_(variance).mul_(2)
    return _add_kl(layout, loc, variance, m, s, weight, g_loc, g_log_scale)


def perturb(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean + √variance·ε and its derivative by the variance, ε / (2√variance), which is 0 where the variance is 0.

    The variance is not clamped: with a minimum of 1e-12, filters whose weights are all pruned would get gradients of 1e6.
    """
    noise = normal(mean.numel(), mean).as_strided(mean.shape, mean.stride())
    constant = variance < TINY  # False for NaN, which stays NaN
    root = variance.masked_fill(constant, 0.0).sqrt_()
    return torch.addcmul(mean, root, noise), noise.mul_(0.5).div_(root).masked_fill_(constant, 0.0)


def joined(layout: Layout, grads: Grads, like: Tensor) -> Tensor:
    """The gradients of all sites' kept weights as one vector [kept], with zeros for a site that has none."""
    parts = zip(grads, layout.kept, strict=True)
    return torch.cat([like.new_zeros(count) if g is None else g for g, count in parts])


def _add_kl(
    layout: Layout, loc: Tensor, variance: Tensor, m: Tensor, s: Tensor, weight: Tensor | None, g_loc: Tensor,
    g_log_scale: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if weight is not None:
        site = layout.site(loc.device)
        rate = (weight / s.square()).index_select(0, site)
        g_loc.addcmul_(loc - m.index_select(0, site), rate)
        g_log_scale.addcmul_(variance, rate).sub_(weight.index_select(0, site))
    return g_loc, g_log_scale
