"""``local_reparameterization``: noise on what a layer computes instead of on its weights."""

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
    """The effect behind :func:`local_reparameterization`."""

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
            _say_once(msg["name"], "is drawn for other sites")
            return
        moments = _moments(msg["name"], base(msg["fn"]))
        if moments is None:
            if not isinstance(msg["fn"], dist.Delta):
                _say_once(msg["name"], f"is a {type(base(msg['fn'])).__name__}, not a Normal per weight")
            return
        # The value is a sample, as anybody expects who meets it: code that torch compiled, an autograd function, an
        # ELBO that asks for log-probabilities. Layers alone recognise it, and take its moments instead.
        noisy = _NoisyWeight(msg["name"], *moments, _sample(base(msg["fn"]), *moments))
        msg["value"], msg["done"] = noisy.sample, True
        msg["infer"] = msg["infer"] | {"by_layers": True}
        self._mode.weights[id(noisy.sample)] = noisy


def _moments(name: str, fn: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of a Normal per weight, 0 where pruned; None for any other distribution."""
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
    """A site's mean and variance, and one sample for whoever cannot use them."""

    name: str
    mean: Tensor
    variance: Tensor
    sample: Tensor


class _NoisyLayers(TorchFunctionMode):
    """Sees every torch function; one that gets a noisy weight where a layer has its weight adds the noise to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, _NoisyWeight] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # what is compiled serves later samples too, and knows none by identity
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
            _say_once(noisy.name, f"is used by {getattr(func, '__name__', func)}, not as the weight of a layer")

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
        if noisy is None:  # a weight that is sampled or not random: its bias is sampled too
            return func(input, weight, bias, *rest, **more)
        mean = func(input, noisy.mean, noisy_bias.mean if noisy_bias else bias, *rest, **more)
        variance = func(_Square.apply(input), noisy.variance, noisy_bias and noisy_bias.variance, *rest, **more)
        return perturb(mean, variance)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        """Attention whose projections are noisy layers: they are made outside and identities given in their place."""
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
        """The parts for query, key and value of a stacked weight or bias, each as noisy as it was."""
        parts, noisy = stacked.split(width), self.weights.get(id(stacked))
        if noisy is not None:
            moments = zip(noisy.mean.split(width), noisy.variance.split(width), strict=True)
            self.weights |= {id(p): _NoisyWeight(noisy.name, *m, p) for p, m in zip(parts, moments, strict=True)}
        return parts


def _differentiated_elsewhere(weight: Tensor) -> bool:
    """Whether we are inside an autograd function or a checkpoint, which differentiates by itself what it was given."""
    return weight.requires_grad and not torch.is_grad_enabled()


LAYER_FUNCTIONS = {F.linear, torch.conv1d, torch.conv2d, torch.conv3d}
LAYER_FUNCTIONS |= {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_QUERIES = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")}
_QUERIES |= {getattr(Tensor, name).__get__ for name in ("is_cuda", "is_leaf", "is_sparse", "is_nested", "grad_fn")}
_QUERIES |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__}


def perturb(mean: Tensor, variance: Tensor) -> Tensor:
    """mean + √variance·ε with ε ~ N(0, 1) per element; may write over its arguments."""
    return _Perturb.apply(mean, variance)  # type: ignore[no-untyped-call]


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        dense = mean.is_contiguous() or mean.is_contiguous(memory_format=torch.channels_last)
        mean = (mean if dense else mean.contiguous()).detach()
        if variance.stride() != mean.stride() or variance.dtype != mean.dtype:
            variance = torch.empty_like(mean).copy_(variance)
        out, rate = kernels.path(mean, bf16=True).perturb(mean, variance.detach())
        ctx.save_for_backward(rate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad * ctx.saved_tensors[0]


_said: set[str] = set()


def _say_once(site: str, reason: str) -> None:
    """Warn of the first site of its kind in this process: a network may have hundreds of them."""
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"local reparameterization: site {site!r} {reason}; weights like it are sampled", stacklevel=2)


class _Square(torch.autograd.Function):
    """x² with its gradient in one temporary; torch's own takes three, and activations are most of the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad * ctx.saved_tensors[0]).mul_(2)


def local_reparameterization() -> LocalReparameterizationMessenger:
    """Within this context a layer with a Normal weight draws its output instead of its weights (Kingma et al. 2015).

    y ~ N(x·loc + b, x²·scale² + b's variance) per element: each example has noise of its own, which takes most of the
    variance out of the gradient for two layer evaluations instead of one. Exact where a linear layer is used once per
    example. Where a weight is used at several positions (convolutions, tokens) every output has the right mean and
    variance, but they are independent where weight samples would correlate them.

    Flipout (Wen et al. 2018) is not offered. It costs two layer evaluations as well and takes out the same correlation
    between examples, by random signs on one shared weight sample; for independent Normal weights an example's output
    has the same mean and variance here without that sample, whose noise the gradient would keep.

    For Linear, Conv and transposed convolutions and attention's projections, under ``sparsify`` too. The guide's site
    must be a Normal per weight; other sites, and weights that something else than a layer uses, are sampled, which a
    warning says once (not within code that torch has compiled or that differentiates itself: ``torch.jit``, autograd
    functions; there they are sampled without one). It is what ``ELBO(estimator="local")`` runs in: around one batch,
    not around predictions.
    """
    return LocalReparameterizationMessenger()
