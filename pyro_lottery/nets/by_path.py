"""The user's own networks, named by import path: ``package.module:function``."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_lottery.errors import UserError, one_line
from pyro_lottery.untrusted import load_callable

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_own(name: str) -> bool:
    """Return whether ``name`` is an import path ``package.module:function``; ``timm:NAME`` is not.

    >>> is_own("nets.small:cnn"), is_own("resnet18"), is_own("timm:resnet18")
    (True, False, False)
    """
    return bool(_PATH.fullmatch(name)) and not name.startswith("timm:")


def create(name: str, offered: Mapping[str, Any]) -> nn.Module:
    """Call the function at ``name`` with those of ``offered`` that it accepts, and return a copy of its network.

    The copy is needed because a network is made Bayesian in place and the function may return the same module twice.
    Raises ``UserError`` if the function fails or does not return an ``nn.Module``.
    """
    function = load_callable(name, "--arch")
    try:
        network = copy.deepcopy(function(**_taken(name, function, offered)))
    except UserError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"--arch {name} failed ({type(error).__name__}: {one_line(error)})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"--arch {name} returned a {type(network).__name__}; expected a torch.nn.Module")
    return network


def _taken(name: str, function: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``offered`` that ``function`` accepts. Raises ``UserError`` if it requires others."""
    parameters = inspect.signature(function).parameters.values()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if unknown := [each for each in needed if each not in by_name & offered.keys()]:
        raise UserError(f"--arch {name} requires {', '.join(unknown)}, but it is called with {', '.join(offered)} only")
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {each: value for each, value in offered.items() if anything or each in by_name}
