"""Shared fixtures. Warnings are errors (pyproject.toml) and Pyro validates everything but the hot loop."""

import os
import re

# Before torch is imported: these networks are too small for threads, and some tests run two processes at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch

import pyro_lottery as pl
from tests.support import TinyNet

pyro.enable_validation(True)
# Flushing files takes a fifth of a small run, and protects them from a power cut alone; tests/test_files.py has the real one.
os.fsync = lambda file: None
collect_ignore_glob = ["soak/[!_t]*.py"]  # without tests; hypothesis, which they import, takes a second and a half


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share a costly fixture go to one process: ``smoke_study``, or a fixture of their module.

    Tests of ``smoke_study`` are slow, because the study trains for many seconds. Slow tests come first, so that no process
    has a long one left when the other has nothing more to do; pytest-xdist keeps this order (--no-loadscope-reorder).
    """
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
        if "smoke_study" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("study"))
            item.add_marker(pytest.mark.slow)
        elif any(found[-1].scope == "module" for found in definitions):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seeded_and_clean():
    torch.manual_seed(0)
    yield
    left = list(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert not left, "something left parameters in Pyro's global store"


@pytest.fixture
def tiny_data():
    """60 + 24 images of three classes that a bright row tells apart."""
    generator = torch.Generator().manual_seed(1)

    def images(count):
        labels = torch.arange(count) % 3
        pixels = torch.randint(0, 80, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
        pixels[torch.arange(count), 0, labels] += 150
        return pixels, labels

    return pl.data.from_tensors(*images(60), *images(24))


@pytest.fixture
def tiny_model():
    return pl.BayesianClassifier(TinyNet(), num_data=60, kl_temperature=0.1)


@pytest.fixture
def half_mask(tiny_model):
    """Every second prunable weight pruned, and one filter of the convolution pruned whole."""
    values = tiny_model.initial_values()
    mask = {n: (torch.arange(values[n].numel()) % 2 == 0).view(values[n].shape) for n in tiny_model.prunable}
    mask["conv.weight"][1] = False
    return mask


@pytest.fixture
def refused(capsys):
    """Asserts that a command ends with exit code 2 (or ``code``) and one line on stderr with ``message``.

    ``.*`` in ``message`` stands for any text.
    """

    def check(main, arguments, message, code=2):
        capsys.readouterr()
        assert main(arguments) == code, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert re.search(".*".join(map(re.escape, message.split(".*"))), error), error

    return check


@pytest.fixture(scope="session")
def smoke_study(tmp_path_factory):
    """The runs, figures and claims of ``python -m experiments.all --protocol smoke``."""
    from experiments import all as everything

    root = tmp_path_factory.mktemp("study") / "runs"
    assert everything.main(["--protocol", "smoke", "--runs", str(root)]) == 0
    return root
