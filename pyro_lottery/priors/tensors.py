"""The tensors of a distribution, also of nested ones: copied, detached, and the parameters that they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def copied(original: Any, tensor: Callable[[Any, str, str], Tensor], path: str = "") -> Any:
    """A deep copy of a distribution or transform in which ``tensor(owner, name, key)`` replaces each tensor."""
    if isinstance(original, torch.distributions.transforms._InverseTransform):
        return copied(original.inv, tensor, path).inv
    owner = copy.copy(original)
    for name, value in list(vars(owner).items()):
        key = f"{path}_{name}" if path else name
        if name == "_inv":  # the cached inverse refers to the original; the copy creates its own on demand
            setattr(owner, name, None)
        elif isinstance(value, Tensor):
            setattr(owner, name, tensor(owner, name, key))
        elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
            setattr(owner, name, copied(value, tensor, key))
        elif isinstance(value, list) and all(isinstance(v, torch.distributions.Transform) for v in value):
            setattr(owner, name, [copied(v, tensor, f"{key}_{place}") for place, v in enumerate(value)])
    return owner


def detached(distribution: Any) -> Any:
    """A copy of a distribution whose tensors do not require gradients."""
    return copied(distribution, lambda owner, name, key: getattr(owner, name).detach())


def tensors_of(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors of a distribution or transform, including nested ones."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        if id(value) not in seen:  # a transform and its inverse refer to each other
            seen.add(id(value))
            for inner in vars(value).values():
                yield from tensors_of(inner, seen)
    elif isinstance(value, list):
        for inner in value:
            yield from tensors_of(inner, seen)


def leaf_of(value: Tensor) -> Tensor | None:
    """The autograd leaf that ``value`` is or expands, as distributions expand their arguments; None if it was computed."""
    if value.is_leaf:
        return value
    leaf = value._base
    if leaf is None or not leaf.is_leaf or leaf.storage_offset() != value.storage_offset():
        return None
    try:
        return leaf if leaf.expand(value.shape).stride() == value.stride() else None
    except RuntimeError:  # a view of another kind
        return None


def leaves_of(distributions: list[Any]) -> list[Tensor]:
    """The autograd leaves with gradients from which the tensors of the distributions are computed."""
    found = {id(t): t for t in tensors_of(distributions) if t.requires_grad and t.is_leaf}
    nodes: list[Any] = [t.grad_fn for t in tensors_of(distributions) if t.grad_fn is not None]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())
