import subprocess
import sys

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import imp, runs
from pyro_lottery.config import Config

from .test_imp import SMALL


@pytest.fixture(scope="module", params=["mean_field", "deterministic", "pyro.infer.autoguide.AutoNormal"])
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return imp.run_imp(Config(**SMALL | {"guide": request.param, "levels": 1, "run_dir": str(path)}))


def test_a_loaded_network_predicts_the_bits_it_predicted_when_saved(run):
    # results.csv was written from the predictive probabilities of the living network; the loaded one must repeat them.
    data = run.load_data()
    for level in (0, 1):
        probs = run.level(level).load_model().predict(data.test, run.config.eval_samples, run.config.seed)
        row = run.results.iloc[level]
        assert pl.metrics.nll(probs, data.test.labels) == row["nll"]
        assert pl.metrics.mace(probs, data.test.labels) == row["mace"]


def test_a_new_process_gives_the_same_bits(run):
    code = (
        "import sys, torch, pyro_lottery as pl; run = pl.load_run(sys.argv[1])\n"
        "probs = run.level(1).load_model().predict(run.load_data().test, 3, seed=5)\n"
        "print(torch.get_num_threads(), probs.double().sum(0).tolist(), probs[7].tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(run.folder.path)], capture_output=True, text=True, check=True
    )
    probs = run.level(1).load_model().predict(run.load_data().test, 3, seed=5)
    assert printed.stdout.strip() == f"{torch.get_num_threads()} {probs.double().sum(0).tolist()} {probs[7].tolist()}"


def test_half_read_predictives_leave_no_mask_and_no_random_state_behind(run):
    network, images = run.level(1).load_model(), run.load_data().test
    expected = [p.probs for p in network.predictives(images, 3)]
    torch.manual_seed(7)
    undisturbed, after = torch.rand(3), torch.rand(3)
    torch.manual_seed(7)
    steps = zip(network.predictives(images, 3), run.level(0).load_model().predictives(images, 3), strict=True)
    found = []
    for one, _ in steps:
        if not found:
            assert torch.equal(torch.rand(3), undisturbed)
            assert all((value != 0).any() for value in run.level(0).load_model().guide().values())
            torch.manual_seed(7)
            torch.rand(3)
        found.append(one.probs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.rand(3), after)


def test_pruned_weights_of_a_loaded_network_are_zero(run):
    network = run.level(1).load_model()
    with pl.handlers.sparsify(network.mask):
        sample = network.guide()
    assert all((sample[s][~m] == 0).all() for s, m in network.mask.items())
    assert torch.equal(network.predict_mean(run.load_data().test), network.predict_mean(run.load_data().test))


def test_runs_read_as_tables_and_names(run):
    assert run.results["level"].tolist() == [0, 1]
    assert run.level(1).history["epoch"].tolist() == [1, 2]
    assert run.level(0).posterior.loc["conv1.weight"].shape == (6, 1, 5, 5)
    assert run.config.arch == "lenet"
    with pytest.raises(pl.UserError, match="no finished level 7"):
        run.level(7)


def test_devices_that_are_not_there_are_named():
    assert runs.resolve_device("cpu").type == "cpu"
    for name in ("cuda:99", "toaster"):
        with pytest.raises(pl.UserError, match=f"--device {name} is not available"):
            runs.resolve_device(name)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(pl.UserError, match="is not a run folder"):
        pl.load_run(tmp_path)
