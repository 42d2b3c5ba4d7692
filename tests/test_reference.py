"""The reference of public names, ``python -m pdoc pyro_lottery``: what their docstrings say, and how they are rendered."""

import ast
import doctest
import inspect
import re
import textwrap
import types
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path

import pdoc.__main__
import pytest

import pyro_lottery as pl
from tests.support import ROOT

MODULES = [
    pl, pl.data, pl.guides, pl.handlers, pl.masks, pl.metrics, pl.plot, pl.priors, pl.scores, pl.tables, pl.tickets,
]  # fmt: skip
SHAPED = re.compile(r"\[.*\]|\bshapes?\b|\bscalars?\b")
"""How a docstring says a shape: ``[n, classes]``, ``the shape of its site``, ``a scalar``."""


def public_names(module):
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


def function_of(member):
    """The function of a method, a property or a decorated function; None for other members."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, cached_property):
        member = member.func
    member = inspect.unwrap(getattr(member, "__func__", member))
    return member if inspect.isfunction(member) else None


def documented():
    """Every public function and class by its name, and the public methods that a class defines itself."""
    found = {}
    for module in MODULES:
        for name in public_names(module):
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found.setdefault(value, f"{module.__name__}.{name}")
    for value, name in list(found.items()):
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and function_of(method):
                found.setdefault(function_of(method), f"{name}.{member}")
    return {name: value for value, name in found.items()}


DOCUMENTED = documented()
FUNCTIONS = {name: value for name, value in DOCUMENTED.items() if inspect.isfunction(value)}


def docstring(name):
    """The docstring; of a method without one the docstring that it inherits, which is what ``help`` and pdoc show."""
    module_or_class, _, member = name.rpartition(".")
    owner = DOCUMENTED.get(module_or_class)
    found = inspect.getdoc(getattr(owner, member) if owner else DOCUMENTED[name])
    return found or ""


def raises_user_error(function):
    """Whether the body raises ``UserError``, by itself or by ``unknown``, which makes one."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return any(getattr(call.func, "id", "") in ("UserError", "unknown") for call in raised)


def takes_or_returns_tensors(function):
    return "Tensor" in str(inspect.signature(function))


def test_the_rules_find_what_they_are_about():
    assert {"pyro_lottery.predict", "pyro_lottery.masks.shrink", "pyro_lottery.BayesianNetwork.outputs"} <= {*FUNCTIONS}
    assert raises_user_error(pl.masks.shrink)
    assert raises_user_error(pl.plot.histograms) is False  # another function does, for its caller
    assert takes_or_returns_tensors(pl.predict)
    assert not SHAPED.search("The accuracy.")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_name_has_a_docstring_that_begins_with_a_sentence(name):
    first = docstring(name).split("\n\n")[0].strip()
    assert re.search(r"[.:)]$", first), first


@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if takes_or_returns_tensors(f)])
def test_shapes_of_tensors_are_said(name):
    assert SHAPED.search(docstring(name)), docstring(name)


@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if raises_user_error(f)])
def test_errors_are_said(name):
    assert "``UserError``" in docstring(name), docstring(name)


@pytest.mark.parametrize("name", [name for name, value in DOCUMENTED.items() if inspect.isclass(value)])
def test_a_class_says_the_errors_of_its_constructor(name):
    own = vars(DOCUMENTED[name])
    written = "__post_init__" if is_dataclass(DOCUMENTED[name]) else "__init__"
    if written in own and raises_user_error(own[written]):
        assert "``UserError``" in docstring(name), docstring(name)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_doctests_run(module):
    """Those of the public modules; pytest itself runs those of all files."""
    result = doctest.testmod(module)
    assert result.failed == 0
    assert "--doctest-modules" in (ROOT / "pyproject.toml").read_text()


def test_the_reference_is_built(tmp_path):
    pdoc.__main__.cli(["pyro_lottery", "-o", str(tmp_path), "--no-show-source", "--no-search"])
    for module in MODULES:
        page = (tmp_path / Path(*module.__name__.split("."))).with_suffix(".html").read_text()
        assert not re.search(r":(func|class|mod|meth|attr):", page)  # pdoc renders the roles of Sphinx, too
        for name in public_names(module):
            if isinstance(value := getattr(module, name), types.ModuleType):
                assert f"{value.__name__.rpartition('.')[2]}.html" in page  # pl.draw is pl.plot
            else:
                assert f'id="{name}"' in page, f"{module.__name__}.{name}"
