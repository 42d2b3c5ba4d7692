"""Finding the state dict in a file: by itself, in a checkpoint, beside averaged weights, or in a file of this library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from pyro_lottery import files, packed, untrusted
from pyro_lottery.errors import Damaged, UserError, one_line
from pyro_lottery.names import grouped, joined, under
from pyro_lottery.weights import kinds, pickles
from pyro_lottery.weights.kinds import not_read

PLAIN = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "net_state_dict", "network", "weights", "params", "module",
)  # fmt: skip
"""Entries of checkpoints that hold the weights, in the order of the search."""
AVERAGED = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema_state", "params_ema", "swa",
)  # fmt: skip
"""Entries of checkpoints that hold a running average of the weights."""
SPARSEST = 2**8
"""Largest ratio of a sparse matrix's elements to the bytes that it stores; another one could take any amount of memory."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a file: ``values`` by the names in the file, and ``mask`` if the file is a ticket of this library, or has masks of torch's pruning."""

    path: Path
    values: Mapping[str, Tensor]
    mask: Mapping[str, Tensor] | None = None
    own: bool = False
    """Whether the file is a ticket or posterior of this library."""

    def checksum(self, *more: Weights | None) -> int:
        """Return the CRC-32 of the names and values, the mask, and ``more`` weights read as masks."""
        masks = [self.mask or {}, *(each.mask or each.values for each in more if each)]
        return files.checksum({**self.values} | {f"mask of {n}": t for mask in masks for n, t in mask.items()})


def load(path: Path, key: str | None = None) -> Weights:
    """Load the state dict from a file of ``torch.save`` or safetensors, with any suffix, without running code from it.

    ``key`` names the entry of a checkpoint, or a nested entry as names joined by dots. Without a key, the usual names are
    tried; if the checkpoint also holds a running average, the weights themselves are taken and a warning names the other
    entries. Raises ``UserError`` for a file without a state dict; the message says what kind of file it is.
    """
    found: Any
    if kinds.kind(path) == kinds.SAFETENSORS:
        found, is_ours = _load_safetensors(path)
    else:
        found, is_ours = pickles.load(path), False
    state = _entry(path, found, key) if key else _state_dict(path, found)
    state = {name: _dense(path, name, value) for name, value in state.items()}
    _check(path, state)
    if is_ours or any(name.startswith("loc/") for name in state):
        return _ours(path, state)
    return Weights(path, state)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of a file and whether this library wrote it; if so, its checksum is verified."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            is_ours = "pyro_lottery" in (file.metadata() or {})
            tensors = {} if is_ours else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return (_own_tensors(path), True) if is_ours else (tensors, False)
    except Damaged as error:
        raise UserError(str(error)) from error
    except Exception as error:  # safetensors may raise anything for a damaged file
        raise not_read(path, f"{one_line(error)}; save it with torch.save or safetensors") from error


def _own_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of this library by group and name, also of a small one."""
    tensors, info = untrusted.load_tensors(path)
    if packed.KEY not in info:
        return tensors
    return joined(packed.unpack(tensors, info))


def _is_state(value: Any) -> bool:
    """Return whether ``value`` is a state dict: it holds tensors, and is not a checkpoint that has a state dict as an entry."""
    if not isinstance(value, Mapping) or not any(isinstance(each, Tensor) for each in value.values()):
        return False
    return not any(_is_state(value.get(name)) for name in (*PLAIN, *AVERAGED))


def _state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    """Return the state dict in the content of a file, found by the usual names in checkpoints."""
    if _is_state(found):
        return _tensors(path, found)
    places = _places(found) if isinstance(found, Mapping) else {}
    plain = [name for name in PLAIN if name in places]
    averaged = [name for name in AVERAGED if name in places]
    other = [name for name in places if name not in (*PLAIN, *AVERAGED)]
    if not places:
        raise UserError(f"{path} has no state_dict: expected a dictionary of tensors by name, {_described(found)}")
    candidates = plain or averaged or other
    if len(candidates) > 1:
        raise UserError(f"{path} has several state_dicts; choose one by its key: {', '.join(candidates)}")
    chosen, others = candidates[0], [name for name in (*plain, *averaged, *other) if name != candidates[0]]
    if others or not plain:
        more = f"; the key can name another entry: {', '.join(others)}" if others else ""
        warnings.warn(f"{path}: the weights are read from its entry {chosen!r}{more}", stacklevel=3)
    return _state_dict(path, places[chosen])


def _places(found: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint that contain state dicts, except those of optimizers, schedulers and the like."""

    def within(value: Any, depth: int) -> bool:
        if _is_state(value):
            return True
        return depth > 0 and isinstance(value, Mapping) and any(within(each, depth - 1) for each in value.values())

    training = ("optim", "sched", "scaler", "callback", "loop")
    return {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and not any(word in name.lower() for word in training) and within(value, 2)
    }


def _entry(path: Path, found: Any, key: str) -> dict[str, Tensor]:
    """Return the entry of a checkpoint that ``key`` names: an entry, a nested entry, or all names with that prefix."""
    entry = _at(found, key)
    if _is_state(entry):
        return _tensors(path, entry)
    if entry is not None:
        return _state_dict(path, entry)
    entries = found if isinstance(found, Mapping) else {}
    try:
        state = _state_dict(path, found)
    except UserError:
        state = {}
    if within := under(f"{key}.", state):
        return within
    named = [str(name) for name in (entries if not _is_state(found) else {name.partition(".")[0] for name in state})]
    raise UserError(f"{path} has no entry {key!r}; it has {', '.join(sorted(named)[:20]) or 'none'}")


def _at(found: Any, key: str) -> Any:
    if not isinstance(found, Mapping):
        return None
    if isinstance(found.get(key), Mapping):
        return found[key]
    first, _, rest = key.partition(".")
    return _at(found.get(first), rest) if rest else None


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict; a warning names other values, which are left out."""
    if odd := [name for name in state if not isinstance(name, str)]:
        raise UserError(f"{path} has no state_dict: its key {odd[0]!r} is not a string")
    left = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        are = "is not a tensor and is" if len(left) == 1 else "are not tensors and are"
        warnings.warn(f"{path}: {', '.join(left[:3])}{more} {are} ignored", stacklevel=4)
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _described(found: Any) -> str:
    if isinstance(found, pickles.Ignored):
        return "found a numpy object"
    if not isinstance(found, Mapping):
        return f"found a {type(found).__name__}"
    if any(isinstance(value, pickles.Ignored) for value in found.values()):
        return "found numpy arrays or numbers"
    return f"found {', '.join(map(str, list(found)[:5])) or 'nothing'}"


def _dense(path: Path, name: str, value: Tensor) -> Tensor:
    """``value``, from a CSR or COO matrix too; raises ``UserError`` for one that is damaged or takes too much memory."""
    if value.layout not in (torch.sparse_csr, torch.sparse_coo):
        return value
    parts: tuple[Any, ...]
    try:
        if value.layout == torch.sparse_csr:
            parts = (value.crow_indices(), value.col_indices(), value.values())
            torch._validate_sparse_csr_tensor_args(*parts, value.shape)
        else:
            parts = (value._indices(), value._values())
            torch._validate_sparse_coo_tensor_args(*parts, value.shape)
    except RuntimeError as error:
        raise UserError(f"{path}: {name} is a damaged sparse matrix ({one_line(error)})") from error
    if value.numel() > SPARSEST * sum(
        part.untyped_storage().nbytes() for part in parts
    ):  # parts may be views of one number
        raise UserError(f"{path}: {name} is a sparse matrix of {tuple(value.shape)} with hardly a value; save it dense")
    return value.to_dense()


def _check(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` for tensors that are not dense real numbers, or whose shapes exceed their stored values."""
    for name, value in state.items():
        if value.is_quantized:
            raise UserError(f"{path}: {name} is quantised ({value.dtype}); save the weights before quantisation")
        if value.device.type == "meta":
            raise UserError(f"{path}: {name} has no values (it is on the meta device); save the weights themselves")
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.dtype not in untrusted.NUMBERS:
            raise UserError(f"{path}: {name} is a {value.dtype} tensor ({value.layout}); expected dense real numbers")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{path}: {name} stores fewer numbers than its shape {tuple(value.shape)} has; save it contiguous"
            )


def _ours(path: Path, tensors: Mapping[str, Tensor]) -> Weights:
    """Return the weights of a ticket or posterior of this library: its loc/ and net/, and its mask/ if it has one."""
    groups = grouped(tensors)
    if not groups["loc"]:
        kind = "a checkpoint of a level in training" if "optimizer" in groups else "a file of this library"
        raise UserError(f"{path} is {kind} without loc/; give a ticket.safetensors or posterior.safetensors")
    return Weights(path, groups["loc"] | groups["net"], groups["mask"] or None, own=True)
