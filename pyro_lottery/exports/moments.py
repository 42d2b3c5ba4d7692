"""Mean and variance of a network's outputs in one deterministic pass: each operation of its graph maps moments to moments.

A weight w with loc μ and scale σ, independent of its input x with mean m and variance v, gives the product mean μ·m and
variance μ²·v + σ²·(m² + v); a layer adds those of its products. Different values are taken as independent and Gaussian.
Rules that are approximations say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyro_lottery.errors import UserError
from pyro_lottery.exports.networks import Pixels, summary

aten = torch.ops.aten
TINY = 1e-12
"""Least variance of an activation, below which a Gaussian's standard deviation has no reciprocal in float32."""
HALF_LOG_4_PI = 0.5 * math.log(4 * math.pi)
SAMPLES = 64
"""Points of the logits' distribution over which the softmax is averaged."""


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian values: mean and variance, of one shape."""

    mean: Tensor
    var: Tensor


Value = Any
"""An argument of an operation: a Gaussian, a tensor that is certain, or any other constant."""
RULES: dict[Any, Callable[..., Any]] = {}


def rule(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the rule of ``operations``, which gets the operation first."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(operations, f))
        return f

    return register


def mean(x: Value) -> Tensor:
    """The mean of a value."""
    return x.mean if isinstance(x, Gaussian) else x


def var(x: Value) -> Tensor:
    """The variance of a value."""
    return x.var if isinstance(x, Gaussian) else torch.zeros_like(x)


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
def _layer(f: Any, x: Value, weight: Value, bias: Value = None, *more: Any) -> Gaussian:
    """A layer with random weights, random inputs, or both."""
    spread: Any = None
    if isinstance(weight, Gaussian):
        spread = f(mean(x).square(), weight.var, None, *more)
    if isinstance(x, Gaussian):
        factor = mean(weight).square() + weight.var if isinstance(weight, Gaussian) else weight.square()
        carried = f(x.var, factor, None, *more)
        spread = carried if spread is None else spread + carried
    if isinstance(bias, Gaussian):
        per_channel = bias.var if f is aten.linear.default else bias.var.view(-1, *(1,) * (mean(weight).ndim - 2))
        spread = per_channel if spread is None else spread + per_channel
    moved = f(mean(x), mean(weight), None if bias is None else mean(bias), *more)
    certain = not isinstance(x, Gaussian) and not isinstance(weight, Gaussian)
    return Gaussian(moved, spread.expand_as(moved) if certain else spread)


@rule(aten.batch_norm.default)
def _batch_norm(f: Any, x: Gaussian, gain: Any, shift: Any, centre: Any, spread: Any, *more: Any) -> Gaussian:
    if more[0] or spread is None:  # of the batch, or of a weight that is standardised by this operation
        raise NotImplementedError
    factor = (spread + more[2]).rsqrt() * (1.0 if gain is None else gain)
    shape = (-1, *(1,) * (x.mean.ndim - 2))
    moved = f(x.mean, gain, shift, centre, spread, *more)
    return Gaussian(moved, x.var * factor.square().view(shape))


@rule(aten.relu.default, aten.relu_.default)
def _relu(f: Any, x: Gaussian) -> Gaussian:
    """E[max(x, 0)] = e = m·Φ(m/s) + s·φ(m/s), and the variance (m² + v)·Φ + m·s·φ − e² = e·(m − e) + v·Φ.

    In as few operations as there are, since each reads and writes all activations.
    """
    m, v = x.mean, x.var.clamp_min(TINY)
    wide = (2 * v).sqrt()
    t = m / wide
    cdf = 0.5 * t.erf() + 0.5
    first = m * cdf + wide * (-t * t - HALF_LOG_4_PI).exp()
    return Gaussian(first, (first * (m - first) + v * cdf).clamp_min(0.0))


_NODES, _WEIGHTS = ([-2.856970, -1.355626, 0.0, 1.355626, 2.856970], [0.011257, 0.222076, 0.533333, 0.222076, 0.011257])


@rule(
    aten.gelu.default, aten.silu.default, aten.silu_.default, aten.sigmoid.default, aten.tanh.default, aten.elu.default,
    aten.elu_.default, aten.leaky_relu.default, aten.leaky_relu_.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default, aten.softplus.default, aten.mish.default,
)  # fmt: skip
def _elementwise(f: Any, x: Gaussian, *more: Any, **options: Any) -> Gaussian:
    """Approximation: Gauss-Hermite quadrature with five points, exact for polynomials up to degree 9."""
    s = x.var.clamp_min(0.0).sqrt()
    values = [f(x.mean + node * s, *more, **options) for node in _NODES]
    first = sum(w * y for w, y in zip(_WEIGHTS, values, strict=True))
    second = sum(w * y.square() for w, y in zip(_WEIGHTS, values, strict=True))
    return Gaussian(first, (second - first.square()).clamp_min(0.0))


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
def _sum(f: Any, x: Value, y: Value) -> Gaussian:
    """Approximation: the summands are independent, as those of a residual connection are not quite."""
    added = f(mean(x), mean(y) if isinstance(y, Gaussian | Tensor) else y)
    spreads = [v.var for v in (x, y) if isinstance(v, Gaussian)]
    return Gaussian(added, sum(spreads[1:], spreads[0]).expand_as(added))


@rule(aten.mul.Tensor, aten.mul_.Tensor)
def _product(f: Any, x: Value, y: Value) -> Gaussian:
    """Approximation: the factors are independent."""
    if isinstance(x, Gaussian) and isinstance(y, Gaussian):
        spread = x.var * y.var + x.var * y.mean.square() + y.var * x.mean.square()
        return Gaussian(x.mean * y.mean, spread)
    random, fixed = (x, y) if isinstance(x, Gaussian) else (y, x)
    return Gaussian(random.mean * fixed, random.var * (fixed * fixed))


@rule(aten.div.Tensor)
def _quotient(f: Any, x: Gaussian, y: Any) -> Gaussian:
    if isinstance(y, Gaussian):
        raise NotImplementedError
    return Gaussian(x.mean / y, x.var / (y * y))


@rule(aten.max_pool2d.default)
def _max_pool(
    f: Any, x: Gaussian, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Gaussian:
    """Clark's moments of the larger of two Gaussians (1961), value by value of a window; approximation: each is a Gaussian."""
    kernel, stride, padding, dilation = (_pair(p) for p in (kernel, stride or kernel, padding, dilation))
    sizes, around = list[int](), list[int]()
    for a in (1, 0):  # F.pad begins with the last dimension
        side, reach = x.mean.shape[2 + a], dilation[a] * (kernel[a] - 1) + 1
        rest = side + 2 * padding[a] - reach
        size = -(-rest // stride[a]) + 1 if ceil_mode else rest // stride[a] + 1
        if ceil_mode and (size - 1) * stride[a] >= side + padding[a]:  # a window begins inside
            size -= 1
        sizes.insert(0, size)
        around += [padding[a], max(padding[a], (size - 1) * stride[a] + reach - side - padding[a])]
    m, v = x.mean, x.var
    if any(around):
        m, v = F.pad(m, around, value=-1e4), F.pad(v, around)

    def shifted(axis: int, values: Tensor) -> list[Tensor]:
        starts = [dilation[axis] * i for i in range(kernel[axis])]
        last = (sizes[axis] - 1) * stride[axis] + 1
        return [values[(slice(None),) * (2 + axis) + (slice(s, s + last, stride[axis]),)] for s in starts]

    for axis in (1, 0):
        (m, v), *others = zip(shifted(axis, m), shifted(axis, v), strict=True)
        for other in others:
            m, v = _larger(m, v, *other)
    return Gaussian(m, v)


def _larger(m: Tensor, v: Tensor, n: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    spread = (v + w).clamp_min(TINY).sqrt()
    r = (m - n) / spread
    cdf, density = _cdf(r), spread * _density(r)
    first = m * cdf + n * (1 - cdf) + density  # exactly m beside the very small values of padding
    second = (m.square() + v) * cdf + (n.square() + w) * (1 - cdf) + (m + n) * density
    return first, (second - first.square()).clamp_min(0.0)


@rule(aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim)
def _average(f: Any, x: Gaussian, *more: Any) -> Gaussian:
    """Approximation: values at different places share their weights, so that their average varies as they do."""
    return Gaussian(f(x.mean, *more), f(x.var, *more))


@rule(aten.layer_norm.default)
def _layer_norm(
    f: Any, x: Gaussian, shape: Any, gain: Any = None, shift: Any = None, eps: float = 1e-5, *more: Any
) -> Gaussian:
    """Approximation: mean and variance over the features are those expected."""
    dims = tuple(range(-len(shape), 0))
    centred = x.mean - x.mean.mean(dims, keepdim=True)
    factor = ((centred.square() + x.var).mean(dims, keepdim=True) + eps).rsqrt()
    factor = factor if gain is None else factor * mean(gain)
    moved = centred * factor
    return Gaussian(moved if shift is None else moved + mean(shift), x.var * factor.square())


@rule(aten.scaled_dot_product_attention.default)
def _attention(f: Any, q: Gaussian, k: Gaussian, v: Gaussian, mask: Any = None, *more: Any, **options: Any) -> Gaussian:
    """Approximation: the attention is that of the mean queries and keys."""
    if mask is not None or any(more) or set(options) - {"scale"}:
        raise NotImplementedError
    scale = options.get("scale") or 1 / math.sqrt(q.mean.shape[-1])
    attention = (q.mean @ k.mean.transpose(-2, -1) * scale).softmax(-1)
    return Gaussian(attention @ v.mean, attention.square() @ v.var)


@rule(aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)
def _dropout(f: Any, x: Gaussian, p: float, train: bool) -> Gaussian:
    return x


@rule(
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.contiguous.default, aten.clone.default, aten.unbind.int, aten.split.Tensor, aten.chunk.default,
    aten.unflatten.int, aten.cat.default, aten.stack.default, aten.pixel_shuffle.default,
    aten.roll.default, aten.channel_shuffle.default, aten.movedim.int, aten.upsample_nearest2d.vec, aten.to.dtype, aten.alias.default,
)  # fmt: skip
def _moved(f: Any, x: Any, *more: Any, **options: Any) -> Any:
    """Values that change places."""
    several = isinstance(x, list | tuple)
    ms, vs = (([part(value) for value in x] if several else part(x)) for part in (mean, var))
    means, spreads = f(ms, *more, **options), f(vs, *more, **options)
    if isinstance(means, Tensor):
        return Gaussian(means, spreads)
    return [Gaussian(m, v) for m, v in zip(means, spreads, strict=True)]


@rule(aten.pad.default)
def _pad(f: Any, x: Gaussian, sizes: Any, mode: str = "constant", value: Any = None) -> Gaussian:
    return Gaussian(f(x.mean, sizes, mode, value), f(x.var, sizes, mode, None if value is None else 0.0))


def _pair(value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, list | tuple) else (value,)
    return pair * 2 if len(pair) == 1 else pair  # type: ignore[return-value]


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) * (1 / math.sqrt(2 * math.pi))


class Moments(nn.Module):
    """Class probabilities of uint8 images, and their entropy, from one pass of means and variances through ``graph``.

    ``graph`` maps normalised images to logits; ``variances`` holds the variances of its weights by their names in it. The
    softmax is averaged over ``SAMPLES`` fixed points of the logits' Gaussian. There is no epistemic entropy among the outputs:
    noise of a filter moves all places of its output together, which independent moments forget, so that it would come out
    2 to 40 times too small on trained networks.
    """

    noise: Tensor

    def __init__(self, graph: fx.GraphModule, variances: dict[str, Tensor], pixels: Pixels, classes: int):
        super().__init__()
        self.means, self.pixels = graph, pixels
        self.names = {name: f"variance{index}" for index, name in enumerate(variances)}
        for name, value in variances.items():
            self.register_buffer(self.names[name], value)
        self.register_buffer("noise", normal_points(SAMPLES, classes))

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [n, classes] of the logits."""
        found = _Propagation(self).run(self.pixels(images))
        found = found[0] if isinstance(found, list | tuple) else found
        return mean(found), var(found)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs of a network of one draw."""
        m, v = self.logits(images)
        points = m + v.clamp_min(0.0).sqrt() * self.noise.unsqueeze(1)
        return summary(points.softmax(-1).mean(0, keepdim=True))


class _Propagation(fx.Interpreter):
    def __init__(self, owner: Moments):
        super().__init__(owner.means)
        self.owner = owner
        self.extra_traceback = False  # or errors have many lines

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        name = self.owner.names.get(target)
        return value if name is None else Gaussian(value, self.owner.get_buffer(name))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not any(isinstance(value, Gaussian) for value in _leaves((args, kwargs))):
            return super().call_function(target, args, kwargs)
        if getattr(target, "__name__", "") == "getitem":
            return super().call_function(target, args, kwargs)
        try:
            return RULES[target](target, *args, **kwargs)
        except (KeyError, NotImplementedError, TypeError) as error:
            raise UserError(
                f"--form moments has no rule for {target}, which this network computes with random values; use --form draws"
            ) from error


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return _leaves(list(value.values()))
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list | tuple) else [value]


def normal_points(count: int, dimensions: int) -> Tensor:
    """``count`` fixed points [count, dimensions] that represent a standard normal: a Sobol sequence through Φ⁻¹.

    Points and their negatives alternate, so that every odd moment is exactly 0.
    """
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(count // 2)
    points = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)
    points = points / points.square().mean(0).sqrt()  # and every variance exactly 1
    return torch.stack((points, -points), 1).reshape(count, dimensions)
