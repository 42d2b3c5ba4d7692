"""Renaming the entries of a state dict to the names of a network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pyro_lottery.errors import UserError

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing insert into names, at any position."""
_COUNTS = ("n_averaged",)
"""Entry that torch.optim.swa_utils.AveragedModel adds to the weights."""
_IN_PARTS = (
    (r"(.*)_g", "{}_v", "weight norm, {}_g and {}_v", "torch.nn.utils.remove_weight_norm"),
    (r"(.*)_orig", "{}_u", "spectral norm, {}_orig and {}_u", "torch.nn.utils.remove_spectral_norm"),
    (r"(?:(.*)\.)?parametrizations\.(\w+)\.original\d*", "", "a parametrization",
     "torch.nn.utils.parametrize.remove_parametrizations"),
)  # fmt: skip
_HALF = (torch.float16, torch.bfloat16)


def fit(
    path: Path, values: Mapping[str, Tensor], wanted: Mapping[str, Tensor], masks: bool = False
) -> dict[str, Tensor]:
    """Return ``values``, read from the file ``path``, under the names of ``wanted``, the network's state.

    Prefixes that all names share (``module.``, ``_orig_mod.``, ``model.``, also several) are removed with a warning if this
    gives the network's names. A missing ``num_batches_tracked`` is filled in from ``wanted``. With ``masks``, values may be
    integers and be named ``NAME_mask``.

    Raises ``UserError`` for integers where the network has floats, for weights stored in parts (weight norm, spectral norm,
    parametrizations), and if the network's names are found only under a prefix that other names lack. The caller checks all
    other names and shapes.
    """
    if masks and all(name.endswith("_mask") for name in values):
        values = {name.removesuffix("_mask"): value for name, value in values.items()}
    found = _stripped(path, values, wanted)
    if masks:
        return found
    _check_parts(path, found, wanted)
    if not found.keys() & wanted.keys() and (within := _within(values, wanted)):
        raise UserError(
            f"{path}: the network's names begin with {' or '.join(within)} in this file; give the key {within[0]!r}"
        )
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked") and name not in found:
            found[name] = value
        if name in found and value.is_floating_point() and not found[name].is_floating_point():
            raise UserError(
                f"{path}: {name} is {found[name].dtype}, perhaps a quantised weight; save weights in floating point"
            )
    return found


def in_half_precision(values: Mapping[str, Tensor]) -> str:
    """Return the name of the half-precision dtype of the first such tensor in ``values``, or an empty string."""
    return next((str(value.dtype).removeprefix("torch.") for value in values.values() if value.dtype in _HALF), "")


def _stripped(path: Path, values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``values`` under those of the possible names that agree with ``wanted`` best."""

    def known(names: Mapping[str, str]) -> int:
        return sum(name in wanted for name in names)

    plain = {name: name for name in values}
    best, stripped = plain, ""
    for names, prefix in _renamings(list(values)):
        if known(names) > known(best):
            best, stripped = names, prefix
    if stripped:
        warnings.warn(f"{path}: names are read without {stripped}", stacklevel=4)
    return {name: values[before] for name, before in best.items()}


def _renamings(names: list[str]) -> Iterator[tuple[dict[str, str], str]]:
    """Yield possible renamings: a dictionary from new to old names, and a text that says what was removed.

    Wrappers are removed at any position, and shared prefixes one after another.
    """
    for wrapped in (False, True):
        found = {(_WRAPPERS.sub("", name) if wrapped else name): name for name in names}
        if len(found) < len(names):
            return  # two names would become equal
        removed = ["_orig_mod."] if wrapped and any("_orig_mod" in name for name in names) else []
        removed += ["its wrappers"] if wrapped and not removed else []
        if wrapped:
            yield found, " and ".join(removed)
        prefix = ""
        while len(shared := {name.partition(".")[0] for name in found if name not in _COUNTS}) == 1:
            prefix += f"{shared.pop()}."
            if not all("." in name for name in found if name not in _COUNTS):
                break
            found = {name.partition(".")[2]: before for name, before in found.items() if name not in _COUNTS}
            yield found, " and ".join([*removed, f"the prefix {prefix}"])


def _within(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes under which ``values`` hold all names of the network."""
    first = next(iter(wanted))
    prefixes = [name.removesuffix(f".{first}") for name in values if name.endswith(f".{first}")]
    return [each for each in prefixes if all(f"{each}.{name}" in values for name in wanted)]


def _check_parts(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` for a weight that is stored as the parts from which it is computed."""
    for name in found:
        for pattern, other, kind, way in _IN_PARTS:
            match = re.fullmatch(pattern, name)
            if match and name not in wanted and (not other or other.format(match[1]) in found):
                parts = kind.format(match[1], match[1])
                raise UserError(f"{path}: {name} is only a part of a weight ({parts}); call {way} and save again")
