"""Imports go one way: ground < method < runs < commands, plot, tables < study < plots < experiments."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from tests.support import ROOT

GROUND = {"errors", "names", "seeds", "threads", "machine", "distributed", "files", "untrusted", "types", "modes", "trees", "faster", "packed"}  # fmt: skip
METHOD = {
    "kernels", "distributions", "nets", "data", "priors", "model", "weights", "handlers", "guides", "elbo", "training",
    "prediction", "metrics", "levels", "posteriors", "diagnostics", "schedules", "scores", "masks", "tickets", "exports",
}  # fmt: skip
RUNS = {"runs"}
COMMANDS = {
    "imp",
    "controls",
    "transplant",
    "evaluate",
    "diagnose",
    "report",
    "sites",
    "find",
    "plot",
    "tables",
    "export",
    "predict",
    "__main__",
}
GROUPS = [GROUND, METHOD, RUNS, COMMANDS]
"""Of the package: a file imports from its own group and from those before it."""
GROUP = {room: number for number, rooms in enumerate(GROUPS) for room in rooms}
ABOVE = ["pyro_lottery", "experiments.study", "plots", "experiments"]
"""What is beside the package, from the ground up; experiments.benchmarks is used by none of them."""


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for folder in ("pyro_lottery", "experiments", "plots") for path in files(folder)}


def imports(path):
    """The modules that a file imports as it is run, not for its types alone."""
    tree = ast.parse(path.read_text())
    types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    skipped = {inner for node in types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in skipped:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import) and node not in skipped:
            yield from (alias.name for alias in node.names)


def room(name):
    return name.split(".")[1]


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("pyro_lottery.")])
def test_imports_go_down(name):
    for other in imports(MODULES[name]):
        if other.startswith("pyro_lottery."):
            assert GROUP[room(other)] <= GROUP[room(name)], f"{name} imports {other}"


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("pyro_lottery")])
def test_experiments_stand_on_plots_and_these_on_the_study(name):
    def floor(found):
        return next(number for number, start in enumerate(ABOVE) if f"{found}.".startswith((f"{start}.", f"{start}_")))

    for other in imports(MODULES[name]):
        if other.startswith(("experiments", "plots", "pyro_lottery")):
            assert floor(other) <= floor(name), f"{name} imports {other}"
            assert not other.startswith("experiments.benchmarks") or name.startswith("experiments.benchmarks")


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: {o for o in imports(path) if o in MODULES and o != name} for name, path in MODULES.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)  # or CycleError, which lists the files


def test_figures_read_and_never_train():
    for path in files("plots"):
        assert not re.search(r"pyro_lottery.*\b(imp|session|training|transplant)\b", path.read_text()), path.name


def test_networks_and_kernels_know_nothing_of_pyro():
    for path in [*files("pyro_lottery/nets"), *files("pyro_lottery/kernels")]:
        assert "pyro" not in {name.split(".")[0] for name in imports(path)}, path.name


def test_every_room_has_its_tests():
    through_others = {"errors", "__main__"}  # through whatever raises, reads and lists
    for name in GROUP.keys() - through_others:
        assert (ROOT / "tests" / f"test_{name}.py").exists() or (ROOT / "tests" / name).is_dir(), name


def test_no_pickle_and_one_torch_load_of_weights_only():
    loads = [line for path in files("pyro_lottery") for line in path.read_text().splitlines() if " torch.load(" in line]
    assert len(loads) == 1
    assert "weights_only=True" in loads[0]
    for path in files("pyro_lottery"):
        names = {
            n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "")
            for n in ast.walk(ast.parse(path.read_text()))
        }
        assert "pickle" not in names
        assert not re.search(r"import pickle\b", path.read_text())
