"""Bayesian lottery tickets on Pyro: sparse Bayesian neural networks by iterative magnitude pruning."""

import sys
from types import ModuleType

import lazy_loader

__version__ = "0.1.0"
# What is here stands in __init__.pyi, and is imported when it is first used: an exported network is predicted without torch.
_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_FORMER = {"draw": "plot"}
"""Former names of what is here."""


def __getattr__(name: str) -> object:
    return _find(_FORMER.get(name, name))


class _Package(ModuleType):
    """This package, in which ``predict`` is the function: importing the command of that name does not replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "predict" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
