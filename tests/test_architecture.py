"""Data flows one way: a module imports only from lower layers."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"errors"},
    {"threads"},
    {"names", "seeds"},
    {"files", "imports", "kernels", "ranks", "own_parameters", "modes", "trees"},
    {"types", "sealed"},
    {"distributions", "weights"},
    {"nets", "data", "handlers", "priors", "metrics", "scores", "masks", "likelihoods", "inputs"},
    {"elbo", "guides", "tickets", "results", "layers"},
    {"model", "pretrained"},
    {"regression"},
    {"prediction", "figures"},
    {"used_weights"},
    {"training", "config", "console", "commands", "own"},
    {"runs"},
    {"levels", "tables", "draw"},
    {"imp", "controls", "transplant", "evaluate", "report", "sites"},
    {"find"},
    {"__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def modules():
    return [
        p
        for p in sorted((ROOT / "pyro_lottery").rglob("*.py"))
        if p.name != "__init__.py" or p.parent.name != "pyro_lottery"
    ]


def room(path):
    return path.relative_to(ROOT / "pyro_lottery").parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pyro_lottery":
            rest = node.module.split(".")[1:]
            yield from ([rest[0]] if rest else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("pyro_lottery."))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(path)
    for other in imported(path):
        assert other == here or LAYER[other] < LAYER[here], f"{here} (layer {LAYER[here]}) imports {other}"


def test_figures_read_and_never_train():
    allowed = {"finished", "protocols", "statistics"}  # of experiments
    for path in sorted((ROOT / "plots").glob("*.py")):
        text = path.read_text()
        assert set(re.findall(r"from experiments\.(\w+) import", text)) <= allowed, path.name
        assert not re.search(
            r"pyro_lottery\.?(imp|levels|training|transplant)\b|import .*\b(training|levels)\b", text
        ), path.name


def test_networks_know_nothing_of_pyro():
    for path in (ROOT / "pyro_lottery" / "nets").glob("*.py"):
        assert "import pyro\n" not in path.read_text()
        assert "from pyro " not in path.read_text()


def test_every_module_has_its_tests():
    for name in LAYER.keys() - {
        "errors",
        "imports",
        "commands",
        "figures",
        "levels",
        "__main__",
    }:  # tested through imp and others
        assert (ROOT / "tests" / f"test_{name}.py").exists() or (ROOT / "tests" / name).is_dir(), name


def test_no_pickle_and_one_torch_load_of_weights_only():
    loads = [line for path in modules() for line in path.read_text().splitlines() if " torch.load(" in line]
    assert len(loads) == 1
    assert "weights_only=True" in loads[0]
    for path in modules():
        names = {
            n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "")
            for n in ast.walk(ast.parse(path.read_text()))
        }
        assert "pickle" not in names
        assert not re.search(r"import pickle\b", path.read_text())
