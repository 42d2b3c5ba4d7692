from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_lottery as pl
from experiments.study import estimate
from pyro_lottery import faster
from pyro_lottery.distributed import Ranks
from pyro_lottery.runs.build import prepare
from pyro_lottery.runs.config import preset
from pyro_lottery.training import precision, precision_for_batch, precision_for_data
from pyro_lottery.training.trial import copied_for
from tests.support import QUICK, TinyNet, same


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """A processor with bf16 instructions and an empty cache folder, whose passes take ``.seconds`` by precision."""
    made = SimpleNamespace(seconds={"32": 1.0, "bf16": 2.0}, now=0.0, passes=[])

    def autocast(device, name):
        made.passes.append(name)
        made.now += made.seconds[name]
        return nullcontext()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pyro_lottery.machine.has_bf16", lambda device: True)
    monkeypatch.setattr(precision, "autocast", autocast)
    monkeypatch.setattr(faster, "time", SimpleNamespace(perf_counter=lambda: made.now))
    monkeypatch.setattr(faster, "_known", {})
    return made


@pytest.fixture
def asked(monkeypatch):
    """What is asked to be measured, instead of a measurement that says bf16."""
    found = []
    monkeypatch.setattr("pyro_lottery.machine.has_bf16", lambda device: True)
    monkeypatch.setattr(precision, "is_faster", lambda bf16, fp32, what: found.append(what) or True)
    return found


@pytest.mark.parametrize(("fp32", "bf16", "found"), [(1.0, 1.3, "32"), (2.0, 1.0, "bf16")])
def test_auto_is_the_precision_whose_passes_take_less_time(processor, tiny_model, fp32, bf16, found):
    processor.seconds = {"32": fp32, "bf16": bf16}
    assert precision_for_batch("auto", tiny_model, torch.randn(8, 1, 4, 4)) == found
    assert len(processor.passes) == 2 * (1 + faster.ROUNDS)


def test_the_first_measurement_counts_for_later_processes_of_this_network_batch_and_threads(
    processor, tiny_model, monkeypatch
):
    def ask(batch=8, model=tiny_model):
        processor.passes.clear()
        monkeypatch.setattr(faster, "_known", {})  # as in a new process
        return precision_for_batch("auto", model, torch.randn(batch, 1, 4, 4)), bool(processor.passes)

    assert ask() == ("32", True)
    processor.seconds = {"32": 2.0, "bf16": 1.0}
    assert ask() == ("32", False)
    again = pl.BayesianClassifier(TinyNet(), pl.priors.flat(), num_data=7)
    assert ask(model=again) == ("32", False), "N, prior and values do not count"
    assert ask(batch=16) == ("bf16", True)
    wider = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    assert ask(model=pl.BayesianClassifier(wider, num_data=60)) == ("bf16", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert ask() == ("bf16", True)


def test_measuring_leaves_the_network_and_the_random_generators_as_they_are(processor):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 3))
    net[1].eval()  # as a user may freeze it
    model = pl.BayesianClassifier(net, num_data=60)
    before, values = model.net_state(), {n: v.clone() for n, v in model.initial_values().items()}
    modes, state, x = [m.training for m in model.modules()], torch.get_rng_state(), torch.randn(8, 1, 4, 4)
    state = torch.get_rng_state()
    precision_for_batch("auto", model, x)
    assert processor.passes
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model.net_state(), before)
    assert same(model.initial_values(), values)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_the_passes_train_in_the_given_precision(tiny_model):
    dtypes = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, x, y: dtypes.append(getattr(y, "dtype", None)))
    try:
        for name in ("32", "bf16"):
            gradients = precision._passes(copied_for("", "", tiny_model), torch.randn(8, 1, 4, 4), name)()
            assert len(gradients) == len(list(TinyNet().parameters()))
            assert all(bool(g.isfinite().all()) for g in gradients)
            assert dtypes[-1] == {"32": torch.float32, "bf16": torch.bfloat16}[name]
    finally:
        hook.remove()


def test_tf32_is_for_a_gpu(tiny_model, tiny_data):
    with pytest.raises(
        pl.UserError, match="--precision tf32 needs a GPU, whose products it rounds; use 32, bf16 or auto"
    ):
        precision_for_data("tf32", tiny_model, tiny_data, 16)


def test_a_given_precision_and_a_processor_without_bf16_are_not_measured(asked, tiny_model, tiny_data, monkeypatch):
    for name in ("32", "bf16"):
        assert precision_for_data(name, tiny_model, tiny_data, 16) == name
    monkeypatch.setattr("pyro_lottery.machine.has_bf16", lambda device: False)
    assert precision_for_data("auto", tiny_model, tiny_data, 16) == "32"
    assert asked == []


def test_the_measured_batch_is_that_of_the_data(asked, tiny_model, tiny_data):
    class Two(Ranks):
        world = 2

    examples = TensorDataset(torch.randn(60, 1, 4, 4), torch.arange(60) % 3)
    loaded = pl.data.from_loaders(DataLoader(examples, 25), DataLoader(examples, 25))
    batches = [(torch.randn(20, 1, 4, 4), torch.arange(20) % 3)] * 3
    listed = pl.data.from_loaders(batches, batches)
    for data, batch_size, ranks, count in (
        (tiny_data, 16, Ranks(), 16), (tiny_data, 500, Ranks(), 60), (tiny_data, 31, Two(), 16), (loaded, 1, Ranks(), 25),
        (listed, 1, Ranks(), 20),
    ):  # fmt: skip
        assert precision_for_data("auto", tiny_model, data, batch_size, ranks) == "bf16"
        assert f" on [{count}, 1, 4, 4] float32," in asked[-1]


def test_all_ranks_take_the_first_ranks_answer(asked, tiny_model, tiny_data):
    class Second(Ranks):
        rank, world = 1, 2

        def first(self, work, *arguments):
            return "32"  # of the first rank

    assert precision_for_data("auto", tiny_model, tiny_data, 16, Second()) == "32"
    assert asked == []


def test_training_in_python_measures_too(asked, tiny_model, tiny_data):
    pl.train(tiny_model, pl.guides.mean_field(tiny_model), tiny_data, **QUICK | {"epochs": 1}, precision="auto")
    assert len(asked) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns where bf16 is emulated
def test_a_plan_measures_what_its_runs_measure(asked, tmp_path):
    config = preset("smoke", arch="lenet", precision="auto", run_dir=str(tmp_path / "run"))
    estimate.measure.cache_clear()
    estimate.measure(estimate.like(config))
    assert prepare(config).config.precision == "bf16"
    assert len(asked) == 2
    assert len(set(asked)) == 1


def test_a_network_that_cannot_be_copied_is_refused_in_one_line(processor, tiny_model):
    tiny_model.file = open(__file__)  # noqa: SIM115
    try:
        with pytest.raises(
            pl.UserError, match=r"--precision auto measures a copy.*cannot pickle.*give --precision 32 or bf16"
        ):
            precision_for_batch("auto", tiny_model, torch.randn(8, 1, 4, 4))
    finally:
        tiny_model.file.close()
