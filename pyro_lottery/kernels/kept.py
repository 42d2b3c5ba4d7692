"""The surviving values of a pruned weight, which travel with the dense tensor to the layer that uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """The weights of a tensor that a mask keeps."""

    mask: Tensor
    """Mask of the tensor, bool."""
    _values: Tensor | None
    _version: int

    def values(self, weight: Tensor) -> Tensor:
        """The kept weights of ``weight`` [kept], in the order of :class:`pyro_lottery.kernels.Layout`."""
        if self._values is not None and weight._version == self._version:  # nobody has changed it in place since
            return self._values
        return weight[self.mask] if weight.ndim != 4 else weight.permute(0, 2, 3, 1)[self.mask.permute(0, 2, 3, 1)]


def with_kept(weight: Tensor, mask: Tensor, values: Tensor | None = None) -> Tensor:
    """Return ``weight`` itself, which is 0 outside ``mask``; :func:`kept_of` then finds its mask, and ``values`` if given."""
    found: Any = weight
    found.kept = Kept(mask, values, weight._version)
    return weight


def kept_of(weight: Tensor) -> Kept | None:
    """Return what :func:`with_kept` noted of ``weight``, or None."""
    return getattr(weight, "kept", None)
