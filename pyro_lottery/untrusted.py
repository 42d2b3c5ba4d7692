"""Import of objects that the user names by import path."""

from __future__ import annotations

import importlib
import re
from typing import Any

from pyro_lottery.errors import UserError

_OURS = re.compile(r"[^.:]*|timm:.*|pyro\.infer\.autoguide\.Auto\w+")
"""Names that import no user code: built-in names, timm's networks and Pyro's AutoGuides."""


def foreign(*names: str) -> list[str]:
    """Return those of ``names`` that import user code: all import paths except timm's networks and Pyro's AutoGuides.

    >>> foreign("mean_field", "timm:resnet18.a1_in1k", "pyro.infer.autoguide.AutoNormal", "os.system", "os:system")
    ['os.system', 'os:system']
    """
    return [name for name in names if not _OURS.fullmatch(name)]


def load_callable(path: str, option: str, *others: type) -> Any:
    """Import and return the class or function at ``package.module.name`` or ``package.module:name``.

    The object may also be an instance of one of ``others``. Raises ``UserError`` that names ``option`` if the import fails
    or gives something else.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's module may raise anything
        text, expected = " ".join(str(error).split()), f"package.module{':' if ':' in path else '.'}name"
        raise UserError(f"{option} {path} cannot be imported ({text}); expected {expected}") from error
    if not (callable(found) or isinstance(found, others)):
        raise UserError(f"{option} {path} is a {type(found).__name__}; expected a class or a function")
    return found
