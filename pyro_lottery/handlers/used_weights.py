"""The weights that layers actually use: masks for layers that transform their weight, and a record of weights in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_lottery.handlers.local_reparameterization import LAYER_FUNCTIONS
from pyro_lottery.handlers.sparsify import active_mask
from pyro_lottery.types import Mask, Sites

_PLAIN: set[Any] = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_PLAIN |= {cls.forward for cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}
_PLAIN_CONVOLUTIONS = {cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_PRODUCTS = {
    F.bilinear,
    torch.einsum,
    torch.tensordot,
    torch.inner,
    torch.dot,
    torch.vdot,
    torch.linalg.vecdot,
    torch.chain_matmul,
}
_PRODUCTS |= {torch.matmul, torch.mm, torch.mv, torch.bmm, torch.linalg.matmul, torch.linalg.multi_dot}
_PRODUCTS |= {torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm}
_PRODUCTS |= {
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.mm,
    Tensor.mv,
    Tensor.bmm,
    Tensor.inner,
    Tensor.dot,
}
_PRODUCTS |= {Tensor.addmm, Tensor.addmv, Tensor.addbmm, Tensor.baddbmm}
_PRODUCTS |= {Tensor.addmm_, Tensor.addmv_, Tensor.addbmm_, Tensor.baddbmm_}
_LOOKUPS: set[Any] = {F.embedding, F.multi_head_attention_forward}
"""Functions whose result is an activation, whatever autograd knows of their inputs."""


@dataclass(frozen=True)
class Use:
    """A weight that a layer function received, and the sites from which it was computed."""

    sites: tuple[str, ...]
    nonzero: int
    elements: int


class UsedWeights(TorchFunctionMode):
    """Records the weights, computed from ``sites``, of linear and convolution functions and of matrix products.

    The values of sites must require grad, since autograd's graph tells what was computed from them. A tensor that also
    depends on ``inputs`` or on a layer's output is an activation, or a mixture for each example, and is left out.
    """

    def __init__(self, sites: Sites, inputs: Iterable[Tensor] = ()):
        super().__init__()
        self._names = {id(value): name for name, value in sites.items()}
        self._inputs = {id(value) for value in inputs}
        self._activations: set[Any] = set()
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYER_FUNCTIONS:
            self._record(kwargs["weight"] if "weight" in kwargs else args[1])
        elif func in _PRODUCTS:
            self._record_all([*args, *kwargs.values()])
        elif func is F.multi_head_attention_forward:
            self._record_all([a for a in (*args, *kwargs.values()) if id(a) in self._names])
        out = func(*args, **kwargs)
        if func in LAYER_FUNCTIONS or func in _LOOKUPS or (func in _PRODUCTS and self._is_of_integers(args)):
            self._activations.add((out[0] if isinstance(out, tuple) else out).grad_fn)
        return out

    def _is_of_integers(self, factors: Any) -> bool:
        """Whether a product is taken for one of a weight and a batch whose inputs, integers, autograd could not follow."""
        return not self._inputs and any(
            isinstance(factor, Tensor) and factor.grad_fn is None and not factor.requires_grad for factor in factors
        )

    def _record_all(self, values: Any) -> None:
        for value in values:
            if isinstance(value, tuple | list):
                self._record_all(value)
            elif isinstance(value, Tensor):
                self._record(value)

    def _record(self, weight: Tensor) -> None:
        sites = self._sources(weight)
        if sites:
            w = weight.detach()  # NaN is not counted: it is 0/0 where a filter without weights is divided by its norm
            self.uses.append(Use(sites, int(((w != 0) & (w == w)).sum()), w.numel()))

    def _sources(self, weight: Tensor) -> tuple[str, ...]:
        if id(weight) in self._names:
            return (self._names[id(weight)],)
        found, seen, todo = [], set(), [weight.grad_fn]
        while todo:
            node: Any = todo.pop()
            if node is None or node in seen:
                continue
            if node in self._activations:
                return ()
            seen.add(node)
            leaf = id(getattr(node, "variable", None))
            if leaf in self._inputs:
                return ()
            if leaf in self._names:
                found.append(self._names[leaf])
            todo += [before for before, _ in node.next_functions]
        return tuple(found)


def mask_what_is_used_(layer: nn.Module, name: str, site: str) -> None:
    """Apply the mask of ``site`` to the weight that the layer uses, if the layer transforms its parameter ``name`` first.

    A standardised convolution (Qiao et al. 2019) subtracts each filter's mean, after which no pruned weight is 0. Under
    ``sparsify`` it therefore uses mask × standardised weight. Running the layer shows whether it transforms its weight.
    """
    if not _may_transform(layer):
        return
    weight = getattr(layer, name)
    mask = (torch.arange(weight.numel(), device=weight.device) % 2 == 0).view(weight.shape)
    use = _use(layer, name, torch.where(mask, torch.rand_like(weight) + 0.5, 0.0))
    if use is not None and use.nonzero > int(mask.sum()) and use.elements == weight.numel():
        layer.forward = _Masked(layer, site, weight.shape)


def _may_transform(layer: Any) -> bool:
    if "forward" in vars(layer):
        return False  # a custom forward, which is checked when it is pruned
    convolve = getattr(type(layer), "_conv_forward", None)
    return type(layer).forward not in _PLAIN or (convolve is not None and convolve not in _PLAIN_CONVOLUTIONS)


def _use(layer: Any, name: str, value: Tensor) -> Use | None:
    """How a layer uses ``value`` as its weight; None if the layer cannot run alone, or does not use it."""
    if isinstance(layer, nn.Linear):
        size: tuple[int, ...] = (2, layer.in_features)
    else:
        field = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        size = (2, layer.in_channels, *field)
    value = value.detach().requires_grad_()
    # A gain that starts at 0 would hide every weight.
    others = {n: torch.ones_like(p) for n, p in layer.named_parameters()}
    others |= {n: b.clone() for n, b in layer.named_buffers()}
    with torch.enable_grad(), UsedWeights({name: value}) as used:
        try:
            torch.func.functional_call(layer, others | {name: value}, (value.new_zeros(size),))
        except Exception:  # it may need more than its input; it is checked when it is pruned
            return None
    return max(used.uses, key=lambda use: use.nonzero, default=None)


def fix_masks_(net: nn.Module, mask: Mask) -> None:
    """Let the layers of ``net`` that transform their weights always use ``mask``, with the shapes of their sites, without a handler."""
    for forward in _masked(net):
        forward.fixed = mask.get(forward.site)


@contextmanager
def fixed_masks(net: nn.Module, mask: Mask) -> Iterator[None]:
    """:func:`fix_masks_` within this context."""
    forwards = _masked(net)
    before = [forward.fixed for forward in forwards]
    try:
        fix_masks_(net, mask)
        yield
    finally:
        for forward, fixed in zip(forwards, before, strict=True):
            forward.fixed = fixed


def transformed(net: nn.Module) -> list[str]:
    """The sites whose layers transform their weight before they use it, and mask it afterwards."""
    return [forward.site for forward in _masked(net)]


def _masked(net: nn.Module) -> list[_Masked]:
    forwards = (vars(layer).get("forward") for layer in net.modules())
    return [forward for forward in forwards if isinstance(forward, _Masked)]


class _Masked:
    """The forward of a layer that transforms its weight, with the mask applied after the transformation."""

    def __init__(self, layer: nn.Module, site: str, shape: torch.Size):
        self.layer, self.site, self.shape = layer, site, shape
        self.fixed: Tensor | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.layer).forward
        mask = active_mask(self.site, self.shape, x.device) if self.fixed is None else self.fixed
        if mask is None:
            return forward(self.layer, x, *args, **kwargs)
        with _Masking(mask):
            return forward(self.layer, x, *args, **kwargs)


class _Masking(TorchFunctionMode):
    """Masks the weight that a layer function receives, if the shapes agree."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in LAYER_FUNCTIONS:
            if "weight" in kwargs:
                kwargs["weight"] = self._masked(kwargs["weight"])
            else:
                args = (args[0], self._masked(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _masked(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(~self.mask, 0.0) if weight.shape == self.mask.shape else weight
