"""The surviving values of a pruned weight, which travel with the dense tensor to the layer that uses it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """The weights of a tensor that a mask keeps."""

    mask: Tensor
    """Mask of the tensor, bool."""
    _values: Tensor | None
    _version: int | None
    """The tensor's version when it was noted; None in inference mode, where torch does not count versions."""

    def __reduce__(self) -> Any:
        """Leave it out of files and copies of the tensor; ``torch.load(weights_only=True)`` takes an empty dictionary."""
        return OrderedDict, ()

    def is_unchanged(self, weight: Tensor) -> bool:
        """Return whether nobody has changed ``weight`` in place since, as far as torch counts changes."""
        return self._version is not None and _version_of(weight) == self._version

    def values(self, weight: Tensor) -> Tensor:
        """The kept weights of ``weight`` [kept], in the order of :class:`pyro_lottery.kernels.Layout`."""
        values = self._values
        if values is not None and values.requires_grad == weight.requires_grad and self.is_unchanged(weight):
            return values
        return weight[self.mask] if weight.ndim != 4 else weight.permute(0, 2, 3, 1)[self.mask.permute(0, 2, 3, 1)]


def with_kept(weight: Tensor, mask: Tensor, values: Tensor | None = None) -> Tensor:
    """Return ``weight`` itself, which is 0 outside ``mask``; :func:`kept_of` then finds its mask, and ``values`` if given."""
    found: Any = weight
    version = _version_of(weight)
    found.kept = Kept(mask, None if version is None else values, version)
    return weight


def kept_of(weight: Tensor) -> Kept | None:
    """Return what :func:`with_kept` noted of ``weight``; None if there is nothing, or if pruned weights are no longer 0."""
    found = getattr(weight, "kept", None)
    if not isinstance(found, Kept):
        return None
    if found.is_unchanged(weight) or not bool(weight.detach().masked_fill(found.mask, 0.0).any()):
        return found
    return None


def _version_of(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version
