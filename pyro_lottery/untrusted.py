"""Objects named on the command line by import path."""

from __future__ import annotations

import importlib
import re
from typing import Any

from pyro_lottery.errors import UserError

_OURS = re.compile(r"[^.:]*|timm:.*|pyro\.infer\.autoguide\.Auto\w+")
"""Names that run no code of the user's: those without an import path, timm's networks and Pyro's AutoGuides."""


def foreign(*names: str) -> list[str]:
    """Those of ``names`` that are import paths of code beyond this library, timm's networks and Pyro's AutoGuides.

    >>> foreign("mean_field", "timm:resnet18.a1_in1k", "pyro.infer.autoguide.AutoNormal", "os.system", "os:system")
    ['os.system', 'os:system']
    """
    return [name for name in names if not _OURS.fullmatch(name)]


def load_callable(path: str, option: str, *others: type) -> Any:
    """The class or function at ``package.module.name`` or ``package.module:name``, or an object of one of ``others``; a
    one-line ``UserError`` naming ``option`` if there is none.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's module may fail in any way
        text, expected = " ".join(str(error).split()), f"package.module{':' if ':' in path else '.'}name"
        raise UserError(f"{option} {path}: cannot be imported ({text}); expected {expected}") from error
    if not (callable(found) or isinstance(found, others)):
        raise UserError(f"{option} {path} is a {type(found).__name__}; expected a class or a function")
    return found
