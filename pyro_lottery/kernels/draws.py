"""Several draws of the weights in one pass: ``Draws`` stands for a weight in a network's layers, and its draws are the lanes.

A batch then has ``at_once()`` entries for each image, one for each draw, and every place of its planes is one vector of draws. A surviving
weight is loaded with all its draws and multiplies such vectors, so that a batch of one image fills the processor's vectors too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_lottery.kernels import native
from pyro_lottery.kernels.batch_last import activations, empty, planes
from pyro_lottery.kernels.kept import Kept, kept_of
from pyro_lottery.kernels.pattern import Pattern, Places
from pyro_lottery.kernels.sparse import Layer

_HARMLESS = {"__get__", "dim", "size", "numel", "is_floating_point"}
"""Functions that read metadata, such as the shape, but no values."""


class NotTogether(Exception):
    """A network uses a weight in another way than these layers do, so that its draws are computed one by one."""


def at_once() -> int:
    """Draws in one pass: the numbers in a vector of this processor."""
    return native.number("pl_sparse_vector")


class Draws(Tensor):
    """Up to ``at_once()`` draws of one weight, of which ``F.conv2d``, ``F.linear`` and ``F.batch_norm`` use each for its part of a batch.

    ``lanes`` [kept, at_once()] are those that its mask keeps, in the order of :class:`pyro_lottery.kernels.Layout`; lanes beyond the draws
    are 0. Any other function raises ``NotTogether``.
    """

    lanes: Tensor
    _mask: Tensor
    _patterns: dict[int, Pattern]
    _ordered: tuple[Places, Tensor] | None

    @staticmethod
    def __new__(cls, draws: Sequence[Tensor]) -> Draws:
        """Stack ``draws`` of one weight, all under one mask."""
        first = draws[0]
        if first.dtype != torch.float32 or first.device.type != "cpu":
            raise NotTogether(f"a weight of {first.dtype} on {first.device}")
        self: Draws = Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)  # type: ignore[attr-defined]
        found = kept_of(first)
        mask = torch.ones_like(first, dtype=torch.bool) if found is None else found.mask
        rest = Kept(mask, None, None)
        each = [(kept_of(draw) or rest).values(draw) for draw in draws]
        self.lanes = torch.zeros(len(each[0]), at_once())
        self.lanes[:, : len(draws)] = torch.stack(each, 1)
        self._mask = mask
        self._patterns = {}
        self._ordered = None
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs)
        own = _FUNCTIONS.get(func)
        if own is None:
            raise NotTogether(func.__name__)
        return own(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotTogether(str(func))

    def pattern(self, groups: int) -> Pattern:
        """The places of the kept values."""
        if groups not in self._patterns:
            self._patterns[groups] = Pattern(self._mask, groups)
        return self._patterns[groups]

    def ordered(self, places: Places) -> Tensor:
        """The values in the order of ``places``, kept until another order is asked for."""
        if self._ordered is None or self._ordered[0] is not places:
            self._ordered = places, self.lanes.index_select(0, places.pos)
        return self._ordered[1]


def repeated(x: Tensor) -> Tensor:
    """Images [n, c, h, w] as a batch [n · at_once(), c, h, w] in batch_last, each for every draw."""
    return activations(planes(x).repeat_interleave(at_once(), -1))


def by_draw(y: Tensor, count: int) -> Tensor:
    """Outputs [n · at_once(), ...] as [count, n, ...]."""
    return y.unflatten(0, (-1, at_once())).transpose(0, 1)[:count]


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:  # fmt: skip
    if not isinstance(weight, Draws) or isinstance(padding, str) or input.ndim != 4 or not _fits(input):
        raise NotTogether("conv2d")
    geometry = [
        (value, value) if isinstance(value, int) else (value[0], value[-1]) for value in (stride, padding, dilation)
    ]
    layer = Layer(weight.pattern(groups), (input.shape[2], input.shape[3]), len(input), *geometry)
    if max(layer.out) * len(input) * max(input.shape[1], weight.shape[0]) * max(input.shape[2:]) >= 2**31:
        raise NotTogether("places are of 32 bits")
    return layer.of_draws(planes(input), weight.ordered(layer.places), None if bias is None else _lanes(bias))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Draws) or input.ndim < 2 or not _fits(input):
        raise NotTogether("linear")
    moved = input.movedim(0, -1).movedim(-2, 0)  # [in, ..., n]
    x = moved.contiguous().flatten(1, -2)[:, None] if input.ndim > 2 else moved.contiguous()[:, None, None]
    layer = Layer(weight.pattern(1), (1, x.shape[2]), len(input))
    y = planes(layer.of_draws(x, weight.ordered(layer.places), None if bias is None else _lanes(bias)))
    return y.view(len(y), *moved.shape[1:]).movedim(0, -2).movedim(-1, 0)


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if training or running_mean is None or running_var is None or input.ndim not in (2, 4) or not _fits(input):
        raise NotTogether("batch_norm")
    x = planes(input) if input.ndim == 4 else input.T.contiguous()
    ones = torch.ones(len(x))
    scale, shift = _lanes(ones if weight is None else weight), _lanes(0 * ones if bias is None else bias)
    scale = scale * (running_var + eps).rsqrt()[:, None]
    shift = shift - running_mean[:, None] * scale
    y = empty(input, *input.shape) if input.ndim == 4 else torch.empty_like(x).T
    memory = planes(y) if input.ndim == 4 else y.T
    native.call("pl_draws_affine", len(x), x[0].numel() // at_once(), x, memory, scale.contiguous(), shift.contiguous())
    return y


def _lanes(weight: Tensor) -> Tensor:
    """A vector [n] of each draw as [n, at_once()]."""
    return weight.lanes if isinstance(weight, Draws) else weight[:, None].expand(-1, at_once()).contiguous()


def _fits(input: Tensor) -> bool:
    return input.dtype == torch.float32 and input.device.type == "cpu" and len(input) % at_once() == 0


_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.conv2d: _convolution,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
}
