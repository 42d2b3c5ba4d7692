"""Objects named on the command line by import path."""

from __future__ import annotations

import importlib
from typing import Any

from pyro_lottery.errors import UserError


def load_object(path: str, option: str) -> Any:
    """The object at ``package.module.name``; a one-line ``UserError`` naming ``option`` if there is none."""
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be imported ({error}); expected package.module.name") from error
