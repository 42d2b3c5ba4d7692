"""A state dict under the names of the network that it is for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pyro_lottery.errors import UserError

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and checkpointing put into names, in any place."""
_COUNTS = ("n_averaged",)
"""What torch.optim.swa_utils.AveragedModel keeps beside the weights."""
_IN_PARTS = (
    (r"(.*)_g", "{}_v", "weight norm, {}_g and {}_v", "torch.nn.utils.remove_weight_norm"),
    (r"(.*)_orig", "{}_u", "spectral norm, {}_orig and {}_u", "torch.nn.utils.remove_spectral_norm"),
    (
        r"(?:(.*)\.)?parametrizations\.(\w+)\.original\d*",
        "",
        "a parametrization",
        "torch.nn.utils.parametrize.remove_parametrizations",
    ),
)
_HALF = (torch.float16, torch.bfloat16)


def fit(
    path: Path, values: Mapping[str, Tensor], wanted: Mapping[str, Tensor], masks: bool = False
) -> dict[str, Tensor]:
    """``values`` of the file ``path`` under the names of ``wanted``, the network's own values.

    A prefix that all names share (``module.``, ``_orig_mod.``, ``model.``, also several) is stripped where the network's
    names remain, with a warning. A missing ``num_batches_tracked`` is the network's. Raises ``UserError`` for whole numbers
    where the network has weights, for weights that are kept in parts, and for names of which only some are the network's,
    with one prefix; other names and shapes are left to the caller. ``masks`` may be whole numbers, and be named ``NAME_mask``.
    """
    if masks and all(name.endswith("_mask") for name in values):
        values = {name.removesuffix("_mask"): value for name, value in values.items()}
    found = _stripped(path, values, wanted)
    if masks:
        return found
    _check_parts(path, found, wanted)
    if not found.keys() & wanted.keys() and (within := _within(values, wanted)):
        raise UserError(
            f"{path}: the network's names begin with {' or '.join(within)}; choose by the key {within[0]!r}"
        )
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked") and name not in found:
            found[name] = value
        if name in found and value.is_floating_point() and not found[name].is_floating_point():
            raise UserError(
                f"{path}: {name} is {found[name].dtype}, as quantised weights are; save them in floating point"
            )
    return found


def in_half_precision(values: Mapping[str, Tensor]) -> str:
    """The half precision that some of ``values`` are in, or empty."""
    return next((str(value.dtype).removeprefix("torch.") for value in values.values() if value.dtype in _HALF), "")


def _stripped(path: Path, values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``values`` by the names that the most of ``wanted`` are among."""

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
    """New names, each with what it was, and what was stripped: wrappers in any place, and one shared prefix after another."""
    for wrapped in (False, True):
        found = {(_WRAPPERS.sub("", name) if wrapped else name): name for name in names}
        if len(found) < len(names):
            return  # two names would be one
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
    """The prefixes with which all names of a network are among ``values``."""
    first = next(iter(wanted))
    prefixes = [name.removesuffix(f".{first}") for name in values if name.endswith(f".{first}")]
    return [each for each in prefixes if all(f"{each}.{name}" in values for name in wanted)]


def _check_parts(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` for a weight that is kept as what it is computed from."""
    for name in found:
        for pattern, other, kind, way in _IN_PARTS:
            match = re.fullmatch(pattern, name)
            if match and name not in wanted and (not other or other.format(match[1]) in found):
                parts = kind.format(match[1], match[1])
                raise UserError(f"{path}: {name} is a part of a weight ({parts}); save it after {way}")
