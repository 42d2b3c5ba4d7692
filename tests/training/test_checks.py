import copy
import math
import warnings

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import training
from pyro_lottery.errors import Diverged
from tests.support import QUICK, TinyNet


def test_a_loss_that_is_not_finite_names_epoch_and_step(tiny_data):
    class Poisoned(TinyNet):
        steps = 0

        def forward(self, x):
            if self.training:
                self.steps += 1
            out = super().forward(x)
            return out * math.nan if self.steps > 4 + 3 else out

    model = pl.BayesianClassifier(Poisoned(), num_data=60)
    with pytest.raises(Diverged, match="epoch 2, step 4"):  # four steps an epoch: the eighth step is bad
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK | {"epochs": 3})


def test_a_buffer_that_is_not_finite_is_met_at_the_next_look_and_never_saved(tiny_data, monkeypatch):
    class Spoiled(TinyNet):
        def forward(self, x):
            if self.training:
                self.bn.running_var.fill_(math.nan)
            return super().forward(x)

    class Stopping(training.Hooks):
        def stopping(self):
            return True

        def stop(self, state):
            pytest.fail("a diverged state was to be saved")

    monkeypatch.setattr("pyro_lottery.training.loop.CHECK_EVERY", 2)
    for hooks, step in ((None, 2), (Stopping(), 1)):
        model = pl.BayesianClassifier(Spoiled(), num_data=60)
        with pytest.raises(
            Diverged, match=rf"a parameter is not finite at epoch 1, step {step} \(.*: net.bn.running_var\)"
        ):
            pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK, hooks=hooks)


class Masked(TinyNet):
    """Adds a buffer that is −∞ from the start, as attention masks are, to what a softmax takes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("attention_mask", torch.zeros(6).index_fill(0, torch.tensor([1, 4]), -math.inf))

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.nn.functional.avg_pool2d(x, 2).flatten(1)
        return self.out((self.hidden(x) + self.attention_mask).softmax(-1))


def test_a_buffer_that_is_infinite_from_the_start_is_no_divergence_unless_it_changes(tiny_data):
    model = pl.BayesianClassifier(Masked(), num_data=60)
    guide, before = pl.guides.mean_field(model), model.net.attention_mask.clone()
    assert math.isfinite(pl.train(model, guide, tiny_data, **QUICK)[-1]["loss"])
    assert torch.equal(model.net.attention_mask, before)

    class Spreading(Masked):
        def forward(self, x):
            if self.training:
                self.attention_mask[0] = -math.inf
            return super().forward(x)

    model = pl.BayesianClassifier(Spreading(), num_data=60)
    with pytest.raises(Diverged, match=r"net\.attention_mask"):
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)


def test_a_parameter_whose_norm_overflows_is_finite(tiny_model, tiny_data):
    tiny_model.net.bn.running_var.fill_(3e38)  # whose square is infinite in float32
    with torch.no_grad():
        tiny_model.net.bn.weight.zero_()
    assert pl.train(tiny_model, pl.guides.mean_field(tiny_model), tiny_data, **QUICK | {"epochs": 1})


def test_num_data_must_be_the_training_set(tiny_data):
    model = pl.BayesianClassifier(TinyNet(), num_data=61)
    with pytest.raises(pl.UserError, match="num_data is 61, but there are 60"):
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)


@pytest.mark.filterwarnings("ignore:densities count only")
def test_sparse_gradients_are_named_before_the_first_step():
    words, y = torch.randint(10, (8, 5)), torch.randn(8, 10)
    net = torch.nn.Sequential(torch.nn.EmbeddingBag(10, 4, sparse=True), torch.nn.Linear(4, 10))
    model = pl.BayesianRegressor(net, num_data=8, noise_scale=1.0)
    data = pl.data.from_loaders([(words, y)])
    with pytest.raises(pl.UserError, match=r"'0' gives sparse gradients, .* build it with sparse=False"):
        pl.train(model, pl.guides.mean_field(model), data, epochs=1)
    net[0].sparse = False
    assert len(pl.train(model, pl.guides.mean_field(model), data, epochs=1)) == 1


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        *((name, wrong) for name in ("epochs", "warmup_epochs", "kl_warmup_epochs") for wrong in (-1, 1.5)),
        *((name, wrong) for name in ("batch_size", "train_samples", "history_samples") for wrong in (-1, 2.5)),
        *((name, wrong) for name in ("lr", "weight_decay") for wrong in (-1, float("nan"), "a")),
        ("batch_size", 0),
        ("train_samples", 0),
    ],
)
def test_odd_numbers_are_named_before_the_first_step(option, wrong, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    before = pl.posterior(guide).loc
    with pytest.raises(pl.UserError, match=f"{option} must be a .* got {wrong!r}"):
        pl.train(tiny_model, guide, tiny_data, **{"epochs": 1, option: wrong})
    assert all(torch.equal(value, before[site]) for site, value in pl.posterior(guide).loc.items())


class Closed(TinyNet):
    """Functions that were made in ``__init__`` keep the layers of the network that is copied."""

    def __init__(self):
        super().__init__()
        self.call = lambda x: TinyNet.forward(self, x)

    def forward(self, x):
        return self.call(x)


class Late(TinyNet):
    """Makes its last layer at the first call."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        x = super().forward(x)
        if self.last is None:
            self.last = nn.Linear(x.shape[1], 3)
        return self.last(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Closed, "computes with none of its random weights: .* call layers as self.layer in forward"),
        (Late, "makes 'last.weight' at its first call, too late for a prior; call it once on an input before"),
    ],
)
def test_a_network_whose_layers_are_others_is_refused_before_the_first_step(make, message, tiny_data):
    model = pl.BayesianClassifier(copy.deepcopy(make()), num_data=60)
    with pytest.raises(pl.UserError, match=message):
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)


def test_a_layer_that_is_never_used_is_warned_of(tiny_data):
    class Left(TinyNet):
        def __init__(self):
            super().__init__()
            self.left, self.last = nn.Linear(100, 100), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(super().forward(x))

    model = pl.BayesianClassifier(Left(), num_data=60)
    with pytest.warns(
        UserWarning, match=r"^'left.weight' can be pruned, but a pass in evaluation mode does not use it"
    ):
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_training_changes_and_no_file_holds_is_warned_of(persistent, tiny_data):
    class Moving(TinyNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("moving", torch.zeros(3), persistent=persistent)
            self.register_buffer("constant", torch.ones(3), persistent=False)

        def forward(self, x):
            x = super().forward(x) * self.constant
            if self.training:
                self.moving.mul_(0.9).add_(0.1 * x.detach().mean(0))
            return x - self.moving

    model = pl.BayesianClassifier(Moving(), num_data=60)
    said = [] if persistent else ["buffer 'moving' changes in training but is not persistent"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pl.train(model, pl.guides.mean_field(model), tiny_data, **QUICK)
    assert [str(warning.message).partition(", so")[0] for warning in found] == said


def test_a_buffer_that_a_prediction_in_inference_mode_made_is_no_obstacle(tiny_data):
    class Positions(TinyNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("places", None, persistent=False)

        def forward(self, x):
            if self.places is None:
                self.places = torch.zeros(3)
            return super().forward(x) + self.places

    model = pl.BayesianClassifier(Positions(), num_data=60)
    guide = pl.guides.mean_field(model)
    with torch.inference_mode():
        pl.predict(model, guide, tiny_data.test, 1)
    assert len(pl.train(model, guide, tiny_data, **QUICK)) == QUICK["epochs"]
