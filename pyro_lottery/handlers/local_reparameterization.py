"""``local_reparameterization``: samples the outputs of layers instead of their weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from pyro_lottery import kernels
from pyro_lottery.distributions import Pruned, SiteNormal, base
from pyro_lottery.handlers.sparsify import active_mask


class LocalReparameterizationMessenger(Messenger):
    """The handler that ``local_reparameterization`` returns."""

    def __init__(self) -> None:
        super().__init__()
        self._mode = _NoisyLayers()

    def __enter__(self) -> LocalReparameterizationMessenger:
        super().__enter__()
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)
        self._mode.weights.clear()
        super().__exit__(*exception)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or not msg["infer"].get("is_weight", True):
            return
        if msg["infer"].get("is_auxiliary"):
            _say_once(msg["name"], "is an auxiliary draw for other sites")
            return
        moments = _moments(msg["name"], base(msg["fn"]))
        if moments is None:
            if not isinstance(msg["fn"], dist.Delta):
                _say_once(msg["name"], f"is a {type(base(msg['fn'])).__name__}, not an independent Normal per weight")
            return
        # The value is a real sample, which compiled code, autograd functions and an ELBO that evaluates
        # log-probabilities need. Only layer functions recognise it, and use its moments instead.
        noisy = _NoisyWeight(msg["name"], *moments, _sample(base(msg["fn"]), *moments))
        msg["value"], msg["done"] = noisy.sample, True
        msg["infer"] = msg["infer"] | {"by_layers": True}
        self._mode.weights[id(noisy.sample)] = noisy


def _moments(name: str, fn: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of an independent Normal per weight, both 0 where pruned; None for any other distribution."""
    if isinstance(fn, SiteNormal):
        return fn.draw.means[fn.number], fn.draw.variances[fn.number]
    if isinstance(fn, Pruned) and type(fn.base_dist) is dist.Normal:
        return torch.where(fn._mask, fn.base_dist.loc, 0.0), torch.where(fn._mask, fn.base_dist.scale.square(), 0.0)
    if type(fn) is not dist.Normal:
        return None
    mask = active_mask(name, fn.batch_shape, fn.loc.device)
    loc, variance = fn.loc, fn.scale.square()
    return (loc, variance) if mask is None else (torch.where(mask, loc, 0.0), torch.where(mask, variance, 0.0))


def _sample(fn: Any, mean: Tensor, variance: Tensor) -> Tensor:
    return fn.rsample() if isinstance(fn, SiteNormal) else perturb(mean.clone(), variance.clone())


@dataclass(frozen=True, eq=False)
class _NoisyWeight:
    """A site's mean and variance, and one sample for code that cannot use these moments."""

    name: str
    mean: Tensor
    variance: Tensor
    sample: Tensor


class _NoisyLayers(TorchFunctionMode):
    """Intercepts torch functions: a layer function whose weight is noisy returns a sample of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, _NoisyWeight] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # compiled code is reused for later samples, so identities mean nothing
            return func(*args, **kwargs)
        met = () if func in _QUERIES else tuple(self._noisy([*args, *kwargs.values()]))
        if any(not _differentiated_elsewhere(noisy.sample) for noisy in met):
            if func in LAYER_FUNCTIONS:
                return self._layer(func, *args, **kwargs)
            if func is F.multi_head_attention_forward:
                return self._attention(*args, **kwargs)
            self._say(func, *met)
        return func(*args, **kwargs)

    def _say(self, func: Any, *met: _NoisyWeight) -> None:
        for noisy in met:
            _say_once(noisy.name, f"is used by {getattr(func, '__name__', func)}, not as a layer's weight")

    def _noisy(self, values: Any) -> Iterator[_NoisyWeight]:
        for value in values:
            if isinstance(value, tuple | list):
                yield from self._noisy(value)
            elif id(value) in self.weights:
                yield self.weights[id(value)]

    def _layer(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        noisy, noisy_bias = self.weights.get(id(weight)), self.weights.get(id(bias))
        self._say(func, *self._noisy([input]))
        if noisy is None:  # the weight is sampled or deterministic, so its bias is sampled too
            return func(input, weight, bias, *rest, **more)
        input, squared = _WithSquare.apply(input)
        mean = func(input, noisy.mean, noisy_bias.mean if noisy_bias else bias, *rest, **more)
        variance = func(squared, noisy.variance, noisy_bias and noisy_bias.variance, *rest, **more)
        return perturb(mean, variance)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        """Attention with noisy projections: computes the projections as noisy layers, and passes identity matrices for them."""
        names = (
            "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn",
            "dropout_p", "out_proj_weight", "out_proj_bias",
        )  # fmt: skip
        a = dict(zip(names, rest, strict=False)) | more
        width, packed, bias = a["embed_dim_to_check"], a["in_proj_weight"], a["in_proj_bias"]
        biases = (None,) * 3 if bias is None else self._thirds(bias, width)
        self._say(F.multi_head_attention_forward, *self._noisy([query, key, value, a["bias_k"], a["bias_v"]]))
        separate = a.pop("use_separate_proj_weight", False)
        weights = [a[f"{n}_proj_weight"] for n in "qkv"] if separate else self._thirds(packed, width)
        projected = [
            self._layer(F.linear, x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]
        identity = torch.eye(width, dtype=projected[0].dtype, device=query.device)
        given = a | dict.fromkeys((f"{n}_proj_weight" for n in "qkv"), identity) | {
            "in_proj_weight": None, "in_proj_bias": None, "use_separate_proj_weight": True,
            "out_proj_weight": identity, "out_proj_bias": None,
        }  # fmt: skip
        attend: Any = F.multi_head_attention_forward
        out, attention = attend(*projected, **given)
        return self._layer(F.linear, out, a["out_proj_weight"], a["out_proj_bias"]), attention

    def _thirds(self, stacked: Tensor, width: int) -> tuple[Tensor, ...]:
        """The query, key and value parts of a stacked weight or bias, each with its part of the noise."""
        parts, noisy = stacked.split(width), self.weights.get(id(stacked))
        if noisy is not None:
            moments = zip(noisy.mean.split(width), noisy.variance.split(width), strict=True)
            self.weights |= {id(p): _NoisyWeight(noisy.name, *m, p) for p, m in zip(parts, moments, strict=True)}
        return parts


def _differentiated_elsewhere(weight: Tensor) -> bool:
    """Whether an autograd function or a checkpoint is running, which differentiates its own inputs."""
    return weight.requires_grad and not torch.is_grad_enabled()


LAYER_FUNCTIONS = {F.linear, torch.conv1d, torch.conv2d, torch.conv3d}
LAYER_FUNCTIONS |= {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_QUERIES = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")}
_QUERIES |= {
    getattr(Tensor, name).__get__ for name in ("is_cuda", "is_leaf", "is_sparse", "is_nested", "grad_fn", "_version")
}
_QUERIES |= {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.__len__,
    Tensor.is_inference,
}


def perturb(mean: Tensor, variance: Tensor) -> Tensor:
    """mean + √variance·ε with ε ~ N(0, 1) for each element; may overwrite its arguments."""
    return _Perturb.apply(mean, variance)  # type: ignore[no-untyped-call]


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        dense = mean.is_contiguous() or mean.is_contiguous(memory_format=torch.channels_last)
        mean = (mean if dense else mean.contiguous()).detach()
        if variance.stride() != mean.stride() or variance.dtype != mean.dtype:
            variance = torch.empty_like(mean).copy_(variance)
        out, rate = kernels.backend(mean, bf16=True).perturb(mean, variance.detach())
        ctx.save_for_backward(rate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad * ctx.saved_tensors[0]


_said: set[str] = set()


def _say_once(site: str, reason: str) -> None:
    """Warn of a reason once per process, for the first site: a network may have hundreds of such sites."""
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"local reparameterization: site {site!r} {reason}; this weight and others like it are sampled",
            stacklevel=2,
        )


class _WithSquare(torch.autograd.Function):
    """x -> (x, x²). The gradient of both is summed in one pass, where torch's own needs four, and activations dominate memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.view_as(x), x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_square: Tensor | None) -> Tensor | None:
        if of_square is None:
            return grad
        (x,) = ctx.saved_tensors
        return (of_square * x).mul_(2) if grad is None else torch.addcmul(grad, of_square, x, value=2)


def local_reparameterization() -> LocalReparameterizationMessenger:
    """Sample the outputs of layers instead of their weights within this context (Kingma et al. 2015).

    Each element of an output is drawn as y ~ N(x·loc + b, x²·scale² + Var[b]), with its own noise for each example
    (weight [out, in], x [n, in], y [n, out] for a linear layer). This removes most of the gradient's variance and costs
    two layer evaluations instead of one. It is exact for a linear layer that is used once per example. Where a weight is
    used at several positions (convolutions, tokens), each output has the right mean and variance, but the outputs are
    independent, whereas a weight sample would correlate them.

    It covers Linear, Conv and transposed convolution layers and the projections of attention, also under ``sparsify``.
    The guide's site must be an independent Normal per weight. Other sites, and weights that are used outside layers, are
    sampled as usual; a warning says so once. There is no warning in code that torch compiled, or that differentiates
    itself (``torch.jit``, autograd functions). ``ELBO(estimator="local")`` enters this context for one batch; do not use
    it for predictions.

    Flipout (Wen et al. 2018) is not offered: it also costs two layer evaluations, and decorrelates examples by random
    signs on one shared weight sample. For independent Normal weights, the outputs here have the same mean and variance
    without that sample, whose noise would stay in the gradient.
    """
    return LocalReparameterizationMessenger()
