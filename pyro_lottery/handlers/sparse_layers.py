"""``sparse_layers``: computes layers at the cost of the weights that a mask keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.faster import Work, is_faster
from pyro_lottery.handlers import layout
from pyro_lottery.kernels import native, norm, sparse
from pyro_lottery.kernels.batch_last import activations, in_batch_last, in_channels_last, is_batch_last, planes
from pyro_lottery.kernels.draws import Draws
from pyro_lottery.kernels.kept import Kept, kept_of
from pyro_lottery.kernels.pattern import Pair, Pattern

_Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]
CHOICES = ("auto", "on", "off")
LEAST = 10_000_000
"""Multiplications of a dense layer below which ``auto`` leaves it dense: calls take longer than the work."""


def measured_code() -> str:
    """A checksum of the code whose time is measured, for which alone a measurement counts."""
    return native.code(__file__)


_entered: ContextVar[int] = ContextVar("entered", default=0)


def are_sparse() -> bool:
    """Whether layers may be computed sparse here, whose activations may be viewed in every layout."""
    return _entered.get() > 0


class SparseLayers(TorchFunctionMode):
    """The handler that ``sparse_layers`` returns."""

    def __init__(self, choice: str = "auto"):
        super().__init__()
        if choice not in CHOICES:
            raise unknown("sparse", choice, CHOICES)
        problem = native.problem()
        if choice == "on" and problem is not None:
            raise UserError(f"--sparse on: {problem}; use auto or off")
        self.choice = "off" if problem is not None else choice
        self.ways: dict[str, str] = {}
        """Layers met so far, and how they are computed: ``sparse`` or ``dense``."""
        self._patterns: dict[tuple[int, int], tuple[Tensor, Pattern]] = {}

    def __enter__(self) -> SparseLayers:
        if self.choice == "off":  # every function of torch would pass here for nothing
            return self
        _entered.set(_entered.get() + 1)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.choice != "off":
            super().__exit__(*error)
            _entered.set(_entered.get() - 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = _FUNCTIONS.get(func)  # first, since every function of torch passes here
        if own is None or Draws in types or _is_transformed():
            return func(*args, **kwargs)
        found = own(self, *args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found

    def pattern(self, kept: Kept, groups: int = 1) -> Pattern:
        """The pattern of a mask, made once."""
        key = id(kept.mask), groups
        if key not in self._patterns:
            self._patterns[key] = (
                kept.mask,
                Pattern(kept.mask, groups),
            )  # the mask is kept, so that its id stays its own
        return self._patterns[key][1]

    def way(self, what: str, work: int, sparse_way: Work, dense_way: Work) -> bool:
        """Whether the layer ``what`` of ``work`` multiplications, if dense, is to be computed sparse."""
        timed = f"{what}, code {measured_code()}"
        chosen = self.choice == "on" or (work >= LEAST and is_faster(sparse_way, dense_way, timed))
        self.ways[what] = "sparse" if chosen else "dense"
        return chosen


def _convolution(
    mode: SparseLayers, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    if input.ndim != 4 or weight.ndim != 4 or isinstance(padding, str):
        return NotImplemented
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    kept = _usable(input, weight, bias)
    if kept is None or not _fits(input, weight, *geometry, groups):
        return NotImplemented
    pattern = mode.pattern(kept, groups)

    def dense(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.conv2d(in_channels_last(x), w, b, *geometry, groups)

    def thin(x: Tensor, values: Tensor, b: Tensor | None) -> Tensor:
        return sparse.convolution(in_batch_last(x), values, b, pattern, *geometry)

    work = weight.numel() * len(input) * math.prod(input.shape[2:]) // math.prod(geometry[0])
    what = f"convolution {_shape(weight)} of {_shape(input)}, stride {stride}, padding {padding}, dilation {dilation}, groups {groups}"
    if _is_chosen(mode, what, work, kept, pattern, input, weight, dense, thin):
        return thin(input.float(), kept.values(weight), bias)
    return dense(input, weight, bias) if is_batch_last(input) else NotImplemented


def _linear(mode: SparseLayers, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    kept = _usable(input, weight, bias)
    if kept is None or weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        return NotImplemented
    if input.numel() // input.shape[-1] * max(weight.shape) >= 2**31:  # places are of 32 bits
        return NotImplemented
    pattern, rows = mode.pattern(kept), input.reshape(-1, input.shape[-1])

    def thin(x: Tensor, values: Tensor, b: Tensor | None) -> Tensor:
        return sparse.linear(x, values, b, pattern)

    what = f"linear {_shape(weight)} of {_shape(rows)}"
    if not _is_chosen(mode, what, weight.numel() * len(rows), kept, pattern, rows, weight, F.linear, thin):
        return NotImplemented
    return thin(rows.float(), kept.values(weight), bias).view(*input.shape[:-1], -1)


def _is_transformed() -> bool:
    """Whether torch compiles or transforms what runs: torch.compile, torch.func, or forward-mode derivatives."""
    level = torch._C._functorch.maybe_current_level()
    return torch.compiler.is_compiling() or level is not None or forward_ad._current_level >= 0


def _usable(input: Tensor, weight: Tensor, bias: Tensor | None) -> Kept | None:
    """What is kept of ``weight``, if the kernels read these tensors as torch does; torch computes or refuses all others."""
    types = {torch.float32, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32}
    fits = weight.dtype == torch.float32 and input.dtype in types and input.device.type == "cpu" and input.numel()
    if bias is not None:
        fits = fits and bias.dtype == torch.float32 and bias.shape == weight.shape[:1]
    return kept_of(weight) if fits else None


def _fits(input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """Whether a convolution is valid, and places fit into 32 bits; torch says what is wrong with another."""
    if min(*stride, *dilation, groups) < 1 or min(padding) < 0 or len(weight) % groups:
        return False
    reach = [dilation[a] * (weight.shape[2 + a] - 1) + 1 for a in (0, 1)]
    inside = all(input.shape[2 + a] + 2 * padding[a] >= reach[a] for a in (0, 1))
    plane = len(input) * math.prod(input.shape[2 + a] + 2 * padding[a] for a in (0, 1))
    return inside and input.shape[1] == weight.shape[1] * groups and plane * max(input.shape[1], len(weight)) < 2**31


def _is_chosen(
    mode: SparseLayers, what: str, work: int, kept: Kept, pattern: Pattern, input: Tensor, weight: Tensor,
    dense: _Way, thin: _Way,
) -> bool:  # fmt: skip
    if pattern.kept == kept.mask.numel():
        return False
    trained = torch.is_grad_enabled() and weight.requires_grad
    density = float(f"{pattern.kept / kept.mask.numel():.1g}")
    random = torch.Generator().manual_seed(0)

    # Each way pays for turning the inputs, as they come, into its layout; what follows pays for its own.
    comes_last = is_batch_last(input)

    def timed(layer: _Way, w: Tensor) -> Callable[[], None]:
        x = torch.randn(input.shape, generator=random, dtype=torch.float32, device="cpu")
        if x.ndim == 4:
            x = in_batch_last(x) if comes_last else x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_(trained and input.requires_grad)
        w = w.detach().clone().requires_grad_(trained)

        def once() -> None:
            y = layer(x, w, None)  # the bias's own gradient must not change
            if trained:
                y.backward(torch.ones_like(y))

        return once

    what = f"{what}, {density:g} kept, {'trained' if trained else 'predicted'}, {_precision(input)}"
    what += ", batch last" if comes_last else ""
    if what in mode.ways:
        return mode.ways[what] == "sparse"

    def sparse_way() -> Callable[[], None]:
        return timed(thin, torch.randn(pattern.kept, generator=random, dtype=torch.float32, device="cpu"))

    return mode.way(what, work, sparse_way, lambda: timed(dense, weight))


def _precision(input: Tensor) -> str:
    return str(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype).removeprefix(
        "torch."
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _batch_norm(
    mode: SparseLayers, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if not (is_batch_last(input) and input.dtype == torch.float32 and input.device.type == "cpu"):
        return NotImplemented
    channels = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" or t.shape != input.shape[1:2] for t in channels):
        return NotImplemented  # torch refuses these, or converts them
    if not training:
        memory = planes(input)
        y = F.batch_norm(memory.flatten(1)[None], running_mean, running_var, weight, bias, False, momentum, eps)
        return activations(y.view(memory.shape))
    y, mean, variance = norm.batch_norm(input, weight, bias, eps)
    count = input[:, 0].numel()
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean, momentum)
        if running_var is not None:
            running_var.lerp_(variance * (count / (count - 1)), momentum)
    return y


def _pool(func: Any) -> Any:
    def pooled(mode: SparseLayers, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_batch_last(input) or kwargs.get("return_indices"):
            return NotImplemented
        # With batch and channels exchanged, this is the channels_last layout, for which torch has fast code.
        return func(input.transpose(0, 1), *args, **kwargs).transpose(0, 1)

    return pooled


def _max_pool(func: Any) -> Any:
    pooled = _pool(func)

    def halved(
        mode: SparseLayers, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        stride = kernel_size if stride is None or stride == [] or stride == () else stride
        twos, none, ones = (2, (2, 2), [2, 2]), (0, (0, 0), [0, 0]), (1, (1, 1), [1, 1])
        is_plain = kernel_size in twos and stride in twos and padding in none and dilation in ones
        if not is_batch_last(input) or return_indices:
            return NotImplemented
        if not is_plain or ceil_mode or torch.is_grad_enabled() or min(input.shape[2:]) < 2:
            return pooled(mode, input, kernel_size, stride, padding, dilation, ceil_mode)
        # Without the places of the maxima, which only gradients need: 1.6 to 2 times as fast on one thread of an AMD EPYC.
        x = planes(input)
        x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        x = torch.maximum(x[:, ::2], x[:, 1::2])
        return activations(torch.maximum(x[:, :, ::2], x[:, :, 1::2]))

    return halved


def _add(func: Any) -> Any:
    def added(mode: SparseLayers, *operands: Any, **kwargs: Any) -> Any:
        """A sum of activations in two layouts, over which torch goes number by number."""
        if len(operands) != 2 or not all(isinstance(each, Tensor) and each.ndim == 4 for each in operands):
            return NotImplemented
        input, other = operands
        if input.shape != other.shape:
            return NotImplemented
        first, second = is_batch_last(input), is_batch_last(other)
        if first == second:
            return NotImplemented
        if func is Tensor.add_:
            return func(input, (in_batch_last if first else in_channels_last)(other), **kwargs)
        return func(in_batch_last(input), in_batch_last(other), **kwargs)

    return added


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


_FUNCTIONS: dict[Any, Any] = {torch.conv2d: _convolution, F.linear: _linear, F.batch_norm: _batch_norm}
_FUNCTIONS |= {func: _pool(func) for func in (F.avg_pool2d, F.adaptive_avg_pool2d)}
_FUNCTIONS |= {func: _max_pool(func) for func in (torch.max_pool2d, F.max_pool2d)}
_FUNCTIONS |= {func: _add(func) for func in (torch.add, Tensor.add, Tensor.add_)}
_FUNCTIONS |= {
    Tensor.view: lambda mode, *args, **kwargs: layout.view(*args, **kwargs),
    Tensor.view_as: lambda mode, *args: layout.view_as(*args),
}


def sparse_layers(choice: str = "auto") -> SparseLayers:
    """Compute layers at the cost of the weights that the enclosing ``sparsify`` keeps, within this context.

    Convolutions [n, c, h, w] and linear layers in float32 on the CPU are computed from their surviving weights: outputs, the
    gradient of the inputs and that of these weights. What lies between them keeps the batch innermost in memory. The
    values are those of dense layers up to rounding, on any number of threads. ``auto`` takes the faster way for each
    layer, which is measured when a layer is met first and kept in the user's cache folder; ``on`` computes every masked
    layer sparse, and ``off`` none. Second derivatives need ``off``; torch.func, forward-mode derivatives and torch.compile
    compute dense layers.

    Raises ``UserError`` for another choice, for ``on`` without a C compiler, and for a second derivative.
    """
    return SparseLayers(choice)
