from collections import namedtuple
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl
from tests.support import TinyNet


def test_what_is_no_tensor_is_named(tiny_data):
    Outputs = namedtuple("Outputs", ["logits", "aux"])

    class Auxiliary(TinyNet):
        def forward(self, x):
            logits = super().forward(x)
            return Outputs(logits, logits) if self.training else logits

    class Named(TinyNet):
        def forward(self, x):
            return {"logits": super().forward(x), "loss": None}

    model = pl.BayesianClassifier(Auxiliary(), num_data=60)
    guide = pl.guides.mean_field(model)
    assert pl.predict(model, guide, tiny_data.test, 1).shape == (24, 3)
    with pytest.raises(pl.UserError, match=r"returned a Outputs of \(60, 3\), \(60, 3\); .* aux_logits=False"):
        pl.train(model, guide, tiny_data, epochs=1)
    model = pl.BayesianClassifier(Named(), num_data=60)
    with pytest.raises(pl.UserError, match=r"returned a dict of \(24, 3\), NoneType; it must return one tensor"):
        pl.predict(model, pl.guides.mean_field(model), tiny_data.test, 1)


def test_a_network_may_change_its_input_in_place(tiny_data):
    class InPlace(TinyNet):
        def forward(self, x):
            return super().forward(x.sub_(1.0))

    class Apart(TinyNet):
        def forward(self, x):
            return super().forward(x - 1.0)

    found = []
    for kind in (InPlace, Apart):
        torch.manual_seed(0)
        data = pl.data.from_tensors(
            tiny_data.train[:], tiny_data.train.targets, tiny_data.test[:], tiny_data.test.targets
        )
        before = data.test.inputs.clone()
        model = pl.BayesianClassifier(kind(), num_data=60)
        guide = pl.guides.mean_field(model)
        pl.train(model, guide, data, epochs=2, milestones=(), train_samples=2)
        found.append(pl.predict(model, guide, data.test, 3))
        assert torch.equal(data.test.inputs, before)
    assert torch.equal(*found)


class Reshaped(nn.Module):
    """Convolutions, pooling and layers of a flat vector."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.hidden, self.out = nn.Linear(8 * 4, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.second(F.max_pool2d(F.relu(self.first(x)), 2))
        return self.out(F.relu(self.hidden(self.flat(F.max_pool2d(F.relu(x), 2)))))

    def flat(self, x):
        return x.reshape(-1, 8 * 4)


class Viewed(Reshaped):
    """The same, as tutorials write it, which the layout of the activations does not allow."""

    def flat(self, x):
        return x.view(-1, 8 * 4)


class ViewedInput(Reshaped):
    def forward(self, x):
        return super().forward(x.view(len(x), -1).view_as(x.contiguous()))


@pytest.mark.parametrize("kind", [Viewed, ViewedInput])
@pytest.mark.parametrize("sparse", ["off", "on"])
def test_a_network_may_take_views_in_any_layout(kind, sparse, tmp_path):
    found, y = [], torch.arange(30) % 3
    x = torch.randint(0, 256, (30, 3, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = pl.data.from_tensors(x, y, x[:9], y[:9])
    for make in (Reshaped, kind):
        torch.manual_seed(0)
        run = pl.find_tickets(
            make(), data, levels=1, prune_fraction=0.6, epochs=2, milestones=(), eval_samples=2, sparse=sparse,
            run_dir=tmp_path / make.__name__,
        )  # fmt: skip
        network = run.level(1).load_model()
        found.append(
            (network.predict(data.test, 3, seed=1), network.predict_mean(data.test), network.as_module()(data.test[:]))
        )
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for form, saved in (("draws", "safetensors"), ("mean", "state_dict")):
        run.level(1).export(tmp_path / saved, form, saved)  # which compares it with the run
    network.as_module(2)(data.test[:])
    if kind is Viewed:  # ViewedInput asks for the batch's size, which torch.export does not know
        run.level(1).export(tmp_path / "export", "draws", "pt2")  # which compares it with the run


class Written(nn.Module):
    """Scales a layer's output through a view of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.scaled(self.conv(x))).mean((2, 3)))

    def scaled(self, x):
        x.view(len(x), -1).mul_(10.0)
        return x


class Scaled(Written):
    def scaled(self, x):
        return x * 10.0


class Script(Written):
    def __init__(self):
        super().__init__()
        self.flat = torch.jit.script(_flat)

    def scaled(self, x):
        return self.flat(x).reshape(x.shape) * 10.0


def _flat(x: torch.Tensor):
    return x.view(x.size(0), -1)


class TrainedViews(Written):
    """A view in training alone, after BatchNorm, whose statistics count the first batch once."""

    def __init__(self, allowed=False):
        super().__init__()
        self.norm, self.allowed = nn.BatchNorm2d(8), allowed

    def scaled(self, x):
        x = self.norm(x)
        if self.training:
            return (x.reshape(len(x), -1) if self.allowed else x.view(len(x), -1)).view(len(x), 8, 8, 8)
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("kinds", [(Written, Scaled), (Script, Scaled), (TrainedViews, partial(TrainedViews, True))])
def test_code_that_relies_on_the_layout_of_activations_has_torchs_own(kinds):
    found, y = [], torch.arange(30) % 3
    x = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = pl.data.from_tensors(x, y, x[:9], y[:9])
    for make in kinds:
        torch.manual_seed(0)
        model = pl.BayesianClassifier(make(), num_data=30)
        guide = pl.guides.mean_field(model)
        pl.train(model, guide, data, epochs=2, batch_size=10, milestones=())
        found.append((pl.predict_mean(model, guide, data.test), pl.posterior(guide).loc["conv.weight"]))
        found[-1] += tuple(value for name, value in model.net_state().items() if "running" in name)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_layout_that_sparse_layers_allow_is_not_taken_for_dense_ones():
    model = pl.BayesianClassifier(Viewed(), num_data=30)
    guide, x, y = pl.guides.mean_field(model), torch.rand(30, 3, 14, 14), torch.arange(30) % 3
    data = pl.data.from_tensors(x, y, x[:9], y[:9])
    mask = {name: torch.rand(model.initial_values()[name].shape) < 0.5 for name in model.prunable}
    with pl.handlers.sparsify(mask):
        with pl.handlers.sparse_layers("auto"):
            pl.train(model, guide, data, epochs=1, batch_size=10)
        assert pl.predict(model, guide, data.test, 2).shape == (9, 3)


class Counted(Viewed):
    """Sets a buffer anew at every call in training, and has one that stays; its view fails after both."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("constant", torch.ones(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls = self.calls + self.constant
        return super().forward(x)


def test_a_pass_that_failed_for_its_layout_leaves_nothing(recwarn):
    model = pl.BayesianClassifier(Counted(), num_data=30)
    x, y = torch.rand(30, 3, 14, 14), torch.arange(30) % 3
    pl.train(model, pl.guides.mean_field(model), pl.data.from_tensors(x, y, x, y), epochs=1, batch_size=10)
    assert model.net.calls == 3
    assert not [str(w.message) for w in recwarn if "constant" in str(w.message)]


def test_an_error_that_is_none_of_the_layout_is_said_as_it_was(tiny_data):
    class Wrong(TinyNet):
        def forward(self, x):
            return super().forward(x).view(-1, 7)

    model = pl.BayesianClassifier(Wrong(), num_data=60)
    with pytest.raises(pl.UserError, match=r"shape '\[-1, 7\]' is invalid for input of size"):
        pl.train(model, pl.guides.mean_field(model), tiny_data, epochs=1)


def test_a_network_that_begins_to_change_its_input_is_stopped():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            if float(x.max()) > 10:
                x /= 8.0
            return self.layer(x)

    model = pl.BayesianClassifier(Sometimes(), num_data=4)
    guide = pl.guides.mean_field(model)
    pl.predict(model, guide, torch.zeros(2, 3), 1)
    with pytest.raises(pl.UserError, match="changes its input in place for this batch, and did not for the first one"):
        pl.predict(model, guide, torch.full((2, 3), 20.0), 3)
    x = torch.full((2, 3), 20.0)
    pl.predict(model, guide, x, 3)  # known now
    assert bool((x == 20.0).all())


class TwoInputs(nn.Module):
    """A network with an image and a vector as inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 1), nn.Linear(2, 1)

    def forward(self, image, vector):
        return self.left(image.flatten(1)) - self.right(vector)


@pytest.mark.parametrize("double", [False, True])
def test_several_inputs_as_tuple_list_and_mapping(double):
    net = TwoInputs().double() if double else TwoInputs()
    model = pl.BayesianRegressor(net, num_data=6, noise_scale=0.5)
    guide = pl.guides.deterministic(model)
    image, vector, y = torch.randn(3, 2, 2), torch.randn(3, 2), torch.randn(3, 1)
    w = pl.posterior(guide).loc
    expected = F.linear(image.flatten(1).to(w["left.weight"]), w["left.weight"], w["left.bias"])
    expected = expected - F.linear(vector.to(expected), w["right.weight"], w["right.bias"])
    for x in ((image, vector), [image, vector], {"vector": vector, "image": image}):
        terms = pl.ELBO().terms(model, guide, x, y)
        torch.testing.assert_close(terms.output.detach(), expected)
        nll = -torch.distributions.Normal(expected, 0.5).log_prob(y).sum() * 2  # 6 examples, 3 of them seen
        assert terms.nll.item() == pytest.approx(nll.item(), rel=1e-6)
    with pytest.raises(pl.UserError, match=r"the examples; got tensors of \(3, 2, 2\), \(2, 2\)"):
        model((image, vector[:2]), y)
