import sys
import warnings

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from experiments.benchmarks import tape
from pyro_lottery import kernels
from pyro_lottery.distributed import ALONE, Ranks
from pyro_lottery.errors import UserError
from pyro_lottery.kernels import torch_path
from pyro_lottery.training import Hooks, TrainState, graph, loop
from tests.support import QUICK, fingerprint, small_run, tiny

GUIDES = "pyro.infer.autoguide."
KINDS = {
    "mean_field": {},
    "deterministic": {"guide": "deterministic"},
    "local": {"estimator": "local"},
    "two samples": {"train_samples": 2},
    "bf16": {"precision": "bf16"},
    "laplace": {"prior": "laplace"},
    "mixture": {"prior": "mixture"},
    "student_t": {"prior": "student_t"},
    "monte_carlo": {"kl": "monte_carlo"},
    "AutoNormal": {"guide": f"{GUIDES}AutoNormal"},
    "AutoNormal, local": {"guide": f"{GUIDES}AutoNormal", "estimator": "local"},
    "AutoDelta": {"guide": f"{GUIDES}AutoDelta", "score": "magnitude"},
    "AutoDiagonalNormal": {"guide": f"{GUIDES}AutoDiagonalNormal"},
    "AutoLowRankMultivariateNormal": {"guide": f"{GUIDES}AutoLowRankMultivariateNormal"},
    "late rewinding": {"rewind": "epoch:1", "epochs": 2},
    "KL warm-up": {"kl_warmup_epochs": 1, "epochs": 2},
    "resnet20": {"arch": "resnet20"},
    "vit_tiny": {"arch": "vit_tiny", "patch_size": 4, "levels": 0, "train_size": 120, "batch_size": 10},
}
SLOW = ("resnet20", "vit_tiny", "AutoLowRankMultivariateNormal")


class Recorder:
    """Stands for a CUDA graph, and counts its replays; without ``works``, it cannot record."""

    def __init__(self, works=True):
        self.works, self.records, self.replays = works, 0, 0

    def __call__(self, work, optimizer):
        if not self.works:
            raise RuntimeError("no graph here")
        self.records += 1
        replay = tape.record(work, optimizer)

        def counted():
            self.replays += 1
            replay()

        return counted


@pytest.fixture
def recording(monkeypatch):
    """A function that lets all steps be recorded on the CPU, and returns the recorder."""

    def start(works=True):
        recorder = Recorder(works)
        monkeypatch.setattr(loop, "recorder", lambda choice, device, ranks: recorder)
        return recorder

    monkeypatch.setattr(torch_path, "CHUNK", 2**40)  # a GPU draws all numbers at once, without seeds from the host
    with kernels.using("torch"):  # the tape does not see kernels in C
        yield start


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS])
def test_a_run_of_replayed_steps_has_the_files_of_one_of_ordinary_steps(tmp_path, recording, monkeypatch, name):
    monkeypatch.setattr(sys.modules["pyro_lottery.handlers.local_reparameterization"], "_said", set())
    options = {"batch_size": 20, "epochs": 1, "sparse": "off", "train_size": 160, "levels": 1} | KINDS[name]
    said = []
    for folder in ("ordinary", "replayed"):
        recorder = recording(works=folder == "replayed")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            small_run(tmp_path / folder, **options)
        said.append([str(w.message) for w in found if "--graph" in str(w.message)])
    assert all("this step cannot be recorded (no graph here)" in text for text in said[0])
    assert len(said[0]) == options["levels"] + 1
    assert said[1] == []
    assert fingerprint(tmp_path / "replayed") == fingerprint(tmp_path / "ordinary")
    assert recorder.replays >= 6


def train(recorder_works, recording, net=None, data=None, **options):
    recorder = recording(recorder_works)
    torch.manual_seed(0)
    model, guide = tiny() if net is None else _of(net())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = pl.train(model, guide, data, **QUICK | {"epochs": 3, "batch_size": 8} | options)
    return recorder, history, {**guide.state_dict(), **model.state_dict()}, [str(w.message) for w in said]


def _of(net):
    model = pl.BayesianClassifier(net, num_data=60)
    return model, pl.guides.mean_field(model)


def without_times(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("epochs", [3, 7])
def test_an_epochs_rest_is_an_ordinary_step(tiny_data, recording, epochs):
    _, history, ordinary, _ = train(False, recording, data=tiny_data, epochs=epochs)
    recorder, replayed_history, replayed, said = train(True, recording, data=tiny_data, epochs=epochs)
    assert said == []
    assert same(ordinary, replayed)
    assert without_times(history) == without_times(replayed_history)
    assert recorder.records == 1
    assert recorder.replays == epochs * 7 - graph.WARM_UP - 1  # 60 images: 7 whole batches an epoch, and a rest of 4


def test_an_epoch_with_another_kl_factor_is_recorded_anew(tiny_data, recording):
    _, _, ordinary, _ = train(False, recording, data=tiny_data, kl_warmup_epochs=2)
    recorder, _, replayed, _ = train(True, recording, data=tiny_data, kl_warmup_epochs=2)
    assert same(ordinary, replayed)
    assert recorder.records == 3


class Moments(Hooks):
    """Puts equal moments in the place of the optimizer's, as a state that is loaded does."""

    def epoch_ended(self, state):
        state.load_state_dict({k: v.clone() if torch.is_tensor(v) else v for k, v in state.state_dict().items()})


def test_a_state_that_is_loaded_meanwhile_is_recorded_anew(tiny_data, recording):
    _, _, ordinary, _ = train(False, recording, data=tiny_data)
    recorder, _, replayed, _ = train(True, recording, data=tiny_data, hooks=Moments(), state=TrainState())
    assert same(ordinary, replayed)
    assert recorder.records > 1


class Warmer(Hooks):
    """Changes the KL temperature after every epoch."""

    def __init__(self):
        self.model = None

    def epoch_ended(self, state):
        self.model.kl_temperature = 0.1 * (1 + state.epoch)


def test_a_model_that_a_hook_changes_is_recorded_anew(tiny_data, recording):
    found, records = [], []
    for works in (False, True):
        recorder, hooks, (model, guide) = recording(works), Warmer(), tiny()
        hooks.model = model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.train(model, guide, tiny_data, **QUICK | {"epochs": 3, "batch_size": 8}, hooks=hooks)
        found.append(guide.state_dict())
        records.append(recorder.records)
    assert same(*found)
    assert records == [0, 3]


def test_a_step_that_moves_weights_the_other_way_does_not_agree():
    weights, sums = torch.zeros(500_000), torch.tensor([300.0, 2e5, 50.0, 128.0, 1.0])
    before, step, other = ([[weights + by], [], [], [sums]] for by in (0.0, 1e-3, -1e-3))
    before[-1] = [torch.zeros(5)]
    assert graph._agree(before, step, step)
    assert not graph._agree(before, step, other)
    late = [*step[:-1], [torch.tensor([300.0, 2e5, 50.0, 120.0, 1.0])]]
    assert not graph._agree(before, step, late)
    nan = [*step[:-1], [torch.tensor([300.0, 2e5, torch.nan, 128.0, 1.0])]]
    assert graph._agree(before, nan, nan)


class Counting(nn.Module):
    """A network whose Python does something else at each call."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x.flatten(1)) * (1 + self.calls % 7)


class Reading(nn.Module):
    """A network for which the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.flatten(1)) * float(x.detach().sum() > 0)


@pytest.mark.parametrize(
    ("net", "why"),
    [(Counting, "does not do what the step does"), (Reading, r"the host would wait for a GPU in _local_scalar_dense")],
)
def test_what_cannot_be_recorded_is_said_once_and_trained_as_usual(recording, net, why):
    torch.manual_seed(1)
    images, labels = torch.randint(256, (60, 1, 2, 2), dtype=torch.uint8), torch.randint(3, (60,))
    data = pl.data.from_tensors(images, labels, images, labels, augment="none")
    # Reading is trained in both cases as it is; Counting's calls differ by the step that is taken twice.
    _, _, ordinary, _ = train(False, recording, net=net, data=data)
    recorder, _, found, said = train(True, recording, net=net, data=data)
    assert recorder.replays == 0
    assert len(said) == 1
    assert why in said[0]
    assert "all steps are taken without it" in said[0]
    assert net is Counting or same(ordinary, found)


def test_auto_records_on_a_gpu_that_trains_alone():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    several = Ranks()
    several.world = 2
    assert graph.recorder("auto", cuda, ALONE) is graph.recorder("on", cuda, ALONE) is graph.cuda_graph
    assert graph.recorder("off", cuda, ALONE) is graph.recorder("auto", cpu, ALONE) is None
    assert graph.recorder("auto", cuda, several) is None
    with pytest.raises(UserError, match="--graph on needs a GPU; use auto or off"):
        graph.recorder("on", cpu, ALONE)
    with pytest.raises(UserError, match="records the steps of one device, and several train here"):
        graph.recorder("on", cuda, several)
    with pytest.raises(UserError, match="--graph"):
        graph.recorder("yes", cuda, ALONE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_a_cuda_graph_has_the_bits_of_ordinary_steps(tiny_data, estimator):
    found = []
    for choice in ("off", "on"):
        model, guide = tiny()
        model.cuda()
        guide.cuda()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            history = pl.train(
                model, guide, tiny_data, **QUICK | {"epochs": 3, "batch_size": 8}, estimator=estimator, graph=choice
            )
        found.append((without_times(history), {**guide.state_dict(), **model.state_dict()}))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
