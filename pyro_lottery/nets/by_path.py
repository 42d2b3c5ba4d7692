"""Networks of the user's own, by import path: ``package.module:function``."""

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
    """Whether ``name`` is an import path; ``timm:NAME`` is timm's.

    >>> is_own("nets.small:cnn"), is_own("resnet18"), is_own("timm:resnet18")
    (True, False, False)
    """
    return bool(_PATH.fullmatch(name)) and not name.startswith("timm:")


def create(name: str, offered: Mapping[str, Any]) -> nn.Module:
    """Call the function at ``name`` with those of ``offered`` that it takes; ``UserError`` unless it gives a network.

    The network is a copy, since the function may give the same module twice, and a network is made Bayesian in place.
    """
    function = load_callable(name, "--arch")
    try:
        network = copy.deepcopy(function(**_taken(name, function, offered)))
    except UserError:
        raise
    except Exception as error:  # the user's function may fail in any way
        raise UserError(f"--arch {name} failed ({type(error).__name__}: {one_line(error)})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"--arch {name} gave a {type(network).__name__}; expected a torch.nn.Module")
    return network


def _taken(name: str, function: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``offered`` that are parameters of ``function``, which must not need others."""
    parameters = inspect.signature(function).parameters.values()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if unknown := [each for each in needed if each not in by_name & offered.keys()]:
        raise UserError(f"--arch {name} needs {', '.join(unknown)}, and it is called with {', '.join(offered)} alone")
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {each: value for each, value in offered.items() if anything or each in by_name}
