import copy
import sys
from contextlib import nullcontext

import numpy as np
import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_lottery as pl
from pyro_lottery import faster
from pyro_lottery.handlers.sparse_layers import SparseLayers, _fits, sparse_layers
from pyro_lottery.kernels import native
from pyro_lottery.kernels.batch_last import in_batch_last, is_batch_last
from pyro_lottery.kernels.kept import kept_of, with_kept

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


class Net(nn.Module):
    """Convolutions, BatchNorm, a residual sum, pooling and linear layers; smooth, so that rounding decides nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.other = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 8, 1, stride=2)
        self.hidden, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.softplus(self.norm(self.first(x)))
        x = torch.tanh(self.second(x) + self.other(x))
        x = F.avg_pool2d(x, 2).mean((2, 3))
        return self.last(torch.tanh(self.hidden(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return pl.BayesianClassifier(Net(), num_data=100)


@pytest.fixture
def batch():
    return torch.randn(20, 1, 8, 8), torch.randint(3, (20,))


def masks_of(model, density=0.3):
    return {
        name: torch.rand(model.initial_values()[name].shape) < density
        for name in pl.posterior(pl.guides.mean_field(model)).prunable
    }


GUIDES = {
    "mean_field": pl.guides.mean_field,
    "deterministic": pl.guides.deterministic,
    "stock": lambda model: pl.guides.auto(AutoNormal, model),
}


def loss_and_gradients(model, guide, mask, batch, layers, estimator="weights"):
    with pl.handlers.sparsify(mask), layers:
        torch.manual_seed(1)
        terms = pl.ELBO(estimator=estimator).terms(model, guide, *batch)
        parameters = [p for p in [*guide.parameters(), *model.parameters()] if p.requires_grad]
        gradients = torch.autograd.grad(terms.nll + terms.tempered_kl, parameters, allow_unused=True)
    return terms.nll.detach(), [torch.zeros(()) if g is None else g for g in gradients], terms.output.detach()


@pytest.mark.parametrize("compressed", [False, True], ids=["whole", "compressed"])
@pytest.mark.parametrize("name", GUIDES)
def test_a_network_and_its_gradients_are_the_dense_ones(model, batch, name, compressed):
    guide, mask = GUIDES[name](model), masks_of(model)
    layers = sparse_layers("on")
    with pl.handlers.sparsify(mask), pl.guides.compressed(guide) if compressed else nullcontext():
        statistics = []
        for each in (sparse_layers("off"), layers):
            model.net.norm.reset_running_stats()
            statistics.append((loss_and_gradients(model, guide, mask, batch, each), model.net.norm.running_var.clone()))
    (dense, dense_var), (thin, thin_var) = statistics
    assert set(layers.ways.values()) == {"sparse"}
    assert len(layers.ways) == 4  # the last layer is not pruned
    torch.testing.assert_close(thin[0], dense[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(thin_var, dense_var, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max() for gradient in dense[1])
    for a, b in zip(thin[1], dense[1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * largest


def test_local_reparameterization_computes_mean_and_variance_sparse(model, batch):
    """With scales near 0, the noisy outputs are the mean's."""
    guide, mask = pl.guides.mean_field(model, 1e-6), masks_of(model)
    layers = sparse_layers("on")
    dense = loss_and_gradients(model, guide, mask, batch, sparse_layers("off"), "local")
    thin = loss_and_gradients(model, guide, mask, batch, layers, "local")
    torch.testing.assert_close(thin[2], dense[2], rtol=1e-4, atol=1e-4)
    assert len(layers.ways) == 4


def test_predictions_are_the_dense_ones(model, batch):
    guide, mask, found = pl.guides.mean_field(model), masks_of(model), []
    for layers in (sparse_layers("off"), sparse_layers("on")):
        torch.manual_seed(2)
        with pl.handlers.sparsify(mask), layers:
            found.append((pl.predict(model, guide, batch[0], 3), pl.predict_mean(model, guide, batch[0])))
    for dense, thin in zip(*found, strict=True):
        torch.testing.assert_close(thin, dense, rtol=1e-5, atol=1e-6)
    assert len(layers.ways) == 4


def test_a_weight_that_was_changed_in_place_is_read_anew():
    mask = torch.tensor([[True, False], [False, True]])
    weight = with_kept(torch.eye(2), mask, torch.ones(2))
    assert kept_of(weight).values(weight).tolist() == [1, 1]
    weight.mul_(3)
    with sparse_layers("on"):
        assert F.linear(torch.ones(1, 2), weight).tolist() == [[3, 3]]
    assert kept_of(weight * 2) is None  # a new tensor is dense


def test_measuring_draws_no_random_number_and_small_layers_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(faster, "_known", {})
    mask = torch.rand(8, 8, 3, 3) < 0.1
    weight = with_kept((torch.randn(mask.shape) * mask).requires_grad_(), mask)
    with sparse_layers() as layers:
        torch.conv2d(torch.randn(2, 8, 8, 8), weight, padding=1)
    assert list(layers.ways.values()) == ["dense"]
    assert not (tmp_path / "pyro_lottery").exists()
    monkeypatch.setattr(sys.modules[SparseLayers.__module__], "LEAST", 0)
    x, state = torch.randn(2, 8, 8, 8), torch.get_rng_state()
    with sparse_layers() as layers:
        y = torch.conv2d(x, weight, padding=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(y, torch.conv2d(x, weight, padding=1), rtol=1e-5, atol=1e-5)
    assert len(list((tmp_path / "pyro_lottery" / "fastest").iterdir())) == 1


@pytest.mark.parametrize("x", [torch.randn(3, 8, 20), torch.randn(0, 8, 4, 4)], ids=["one dimension", "no example"])
def test_what_is_not_covered_stays_dense(x):
    size = (8, 8, 3) if x.ndim == 3 else (8, 8, 3, 3)
    mask = torch.rand(size) < 0.3
    weight = with_kept(torch.randn(size) * mask, mask)
    func = F.conv1d if x.ndim == 3 else F.conv2d
    with sparse_layers("on") as layers:
        y = func(x, weight, padding=1)
    assert torch.equal(y, func(x, weight, padding=1))
    assert not layers.ways


def test_layers_with_more_places_than_32_bits_are_dense():
    one = (1, 1)
    x, weight = torch.zeros(1).expand(2**15, 64, 32, 32), torch.zeros(8, 64, 3, 3)  # 2**31 numbers
    assert not _fits(x, weight, one, one, one, 1)
    assert _fits(x[: 2**14], weight, one, one, one, 1)
    assert not _fits(x[: 2**14, :8], torch.zeros(128, 8, 3, 3), one, one, one, 1)  # outputs


def test_bad_choices_are_named(monkeypatch):
    with pytest.raises(pl.UserError, match="unknown sparse 'never'"):
        sparse_layers("never")
    monkeypatch.setattr(native, "_load", lambda: (None, "there is no C compiler"))
    with pytest.raises(pl.UserError, match="--sparse on: there is no C compiler; use auto or off"):
        SparseLayers("on")
    assert SparseLayers("auto").choice == "off"


def test_pools_and_norms_of_dense_networks_are_left_alone():
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2))
    with sparse_layers("on"):
        found = net(x)
    net[1].reset_running_stats()
    assert torch.equal(found, net(x))
    pyro.clear_param_store()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize(
    "pool",
    [
        F.max_pool2d,
        torch.max_pool2d,
        nn.MaxPool2d(2),
        lambda x, k: F.max_pool2d(x, 3, 2, 1),
        lambda x, k: F.max_pool2d(x, k, ceil_mode=True),
    ],
)
def test_maxima_of_batch_last_activations_are_torchs(pool, size, trained):
    x = torch.randn(6, 3, *size)
    x[0, 0, 0, 0] = torch.nan
    arguments = () if isinstance(pool, nn.Module) else (2,)
    with torch.set_grad_enabled(trained):
        expected = pool(x, *arguments)
        with sparse_layers("on"):
            found = pool(in_batch_last(x), *arguments)
    assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
    assert is_batch_last(found)


@pytest.mark.parametrize(
    ("add", "in_place"), [(torch.add, False), (lambda a, b: a + b, False), (lambda a, b: a.add_(b), True)]
)
@pytest.mark.parametrize("turned", [0, 1])
def test_activations_in_two_layouts_are_added_in_one(add, in_place, turned):
    pair = [torch.randn(6, 3, 4, 4, requires_grad=True) for _ in range(2)]
    as_they_come = [in_batch_last(x) if i == turned else x * 1 for i, x in enumerate(pair)]
    grad = torch.randn(6, 3, 4, 4)
    with sparse_layers("on"):
        y = add(*as_they_come)
        assert torch.equal(y, pair[0] + pair[1])
        assert is_batch_last(y) == (turned == 0 or not in_place)
        assert all(torch.equal(g, grad) for g in torch.autograd.grad(y, pair, grad))


def test_what_torch_refuses_or_takes_of_pools_sums_and_norms_it_does_within_the_handler():
    x, last = torch.randn(6, 3, 1, 4), in_batch_last(torch.randn(6, 3, 4, 4))
    with torch.no_grad(), sparse_layers("on"):
        with pytest.raises(RuntimeError, match="too small"):
            F.max_pool2d(in_batch_last(x), 2)
        with pytest.raises(RuntimeError, match="stride"):
            F.max_pool2d(last, 2, 0)
        with pytest.raises(RuntimeError, match="weight"):
            F.batch_norm(last, None, None, torch.ones(2), training=True)
        assert F.max_pool2d(torch.randn(1, 3, 4, 4), np.int64(2)).shape == (1, 3, 2, 2)
        assert torch.equal(torch.add(last, last, alpha=2), last * 3)
        coo = torch.eye(2).view(1, 1, 2, 2).to_sparse()
        assert torch.equal((coo + coo).to_dense(), 2 * torch.eye(2).view(1, 1, 2, 2))


def test_a_measurement_leaves_gradients_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(faster, "_known", {})
    monkeypatch.setattr(sys.modules[SparseLayers.__module__], "LEAST", 0)
    weight, bias, x = (
        pruned(8, 8, 3, 3),
        torch.zeros(8, requires_grad=True),
        torch.randn(4, 8, 6, 6, requires_grad=True),
    )
    row, few = pruned(8, 8), torch.randn(4, 8, requires_grad=True)
    with sparse_layers() as layers:
        torch.conv2d(in_batch_last(x), weight, bias, padding=1)
        torch.conv2d(x, weight, bias, padding=1)
        F.linear(few, row, bias)
    assert len(layers.ways) == 3, "a layer is measured for each layout in which its inputs come"
    assert [t.grad for t in (weight, bias, x, row, few)] == [None] * 5


def pruned(*shape, **options):
    """A weight of which about a third is kept."""
    mask = torch.rand(shape) < 0.3
    return with_kept((torch.randn(shape, **options) * mask).requires_grad_(), mask)


WRONG = {
    "too many channels": lambda: torch.conv2d(torch.randn(4, 7, 8, 8), pruned(8, 6, 3, 3)),
    "too few channels": lambda: torch.conv2d(torch.randn(4, 5, 8, 8), pruned(8, 6, 3, 3)),
    "filter larger than the image": lambda: torch.conv2d(torch.randn(4, 6, 2, 2), pruned(8, 6, 3, 3)),
    "groups that do not divide": lambda: torch.conv2d(torch.randn(4, 6, 8, 8), pruned(8, 2, 3, 3), groups=3),
    "negative padding": lambda: torch.conv2d(torch.randn(4, 6, 8, 8), pruned(8, 6, 3, 3), padding=-1),
    "a bias too short": lambda: torch.conv2d(torch.randn(4, 6, 8, 8), pruned(8, 6, 3, 3), torch.randn(4)),
    "too few features": lambda: F.linear(torch.randn(4, 19), pruned(10, 20)),
    "another dtype": lambda: F.linear(torch.randn(4, 20).double(), pruned(10, 20)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_torch_refuses_is_refused_by_torch(name):
    with pytest.raises(RuntimeError) as expected:
        WRONG[name]()
    with sparse_layers("on"), pytest.raises(RuntimeError) as found:
        WRONG[name]()
    assert str(found.value) == str(expected.value)


X, IMAGES, GRADIENT = torch.randn(5, 20), torch.randn(5, 6, 8, 8), torch.randn(5, 8, 8, 8)
ODD = {
    "scalar bias": lambda w, v: F.linear(X, w, torch.tensor(2.0)),
    "bias per example": lambda w, v: F.linear(X, w, torch.arange(50.0).view(5, 10)),
    "weight that is a vector": lambda w, v: F.linear(X, with_kept(w[0].detach(), w[0] != 0)),
    "strided input": lambda w, v: torch.conv2d(IMAGES.flip(3).transpose(2, 3)[:, :, ::2], v),
    "vmap": lambda w, v: torch.vmap(lambda x: torch.conv2d(x, v.detach()))(IMAGES[None].expand(3, -1, -1, -1, -1)),
    "vmap of a layer": lambda w, v: torch.vmap(lambda x: torch.conv2d(x, v))(IMAGES[None].expand(3, -1, -1, -1, -1)),
    "torch.func.grad": lambda w, v: torch.func.grad(lambda x: F.linear(x, w).pow(3).sum())(X),
    "torch.func.jvp": lambda w, v: torch.func.jvp(lambda x: F.linear(x, w).pow(3), (X,), (X + 1,))[1],
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize("name", ODD)
def test_unusual_calls_have_the_dense_result(name):
    w, v = pruned(10, 20), pruned(8, 6, 3, 3)
    with sparse_layers("on"):
        found = ODD[name](w, v)
    torch.testing.assert_close(found, ODD[name](w, v), rtol=1e-5, atol=1e-5)


LAST = torch.channels_last
VIEWS = {
    "pixels": lambda y: y.permute(0, 2, 3, 1).view(-1, 8),
    "several examples": lambda y: y.view_as(torch.empty(5 * 8, 8, 8)),
    "flat": lambda y: y.view(5, -1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_outputs_can_be_viewed_as_those_of_dense_layers(name):
    v = pruned(8, 6, 3, 3)
    dense = torch.conv2d(IMAGES.contiguous(memory_format=LAST), v.contiguous(memory_format=LAST), padding=1)
    expected = VIEWS[name](dense if name == "pixels" else dense.contiguous())
    with sparse_layers("on"):
        found = VIEWS[name](torch.conv2d(IMAGES, v, padding=1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_outputs_can_be_changed_in_place():
    """As ReLU(inplace=True) and ``out += x`` do in residual networks."""

    def block(layer, norm):
        y = torch.conv2d(IMAGES, layer, padding=1)
        z = norm(y)
        z += y
        z = F.relu(z, inplace=True)
        return z, *torch.autograd.grad(z, norm.parameters(), GRADIENT)

    v = pruned(8, 6, 3, 3)
    with sparse_layers("on"):
        found = block(v, nn.BatchNorm2d(8))
    for a, b in zip(found, block(v, nn.BatchNorm2d(8)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused_and_never_zero():
    w, v = pruned(10, 20), pruned(8, 6, 3, 3)
    norm = nn.BatchNorm2d(8)
    with sparse_layers("on"):
        for function, x in ((lambda x: F.linear(x, w), X), (lambda x: norm(torch.conv2d(x, v)), IMAGES)):
            with pytest.raises(pl.UserError, match="no second derivatives; use --sparse off"):
                torch.autograd.functional.hvp(lambda x, function=function: function(x).pow(3).sum(), x, x)


def test_predictions_in_inference_mode_are_the_usual_ones(model, batch):
    guide, mask = pl.guides.mean_field(model), masks_of(model)
    for choice in ("off", "on"):
        found = []
        for mode in (nullcontext(), torch.inference_mode()):
            torch.manual_seed(2)
            with pl.handlers.sparsify(mask), sparse_layers(choice), mode:
                found.append(pl.predict(model, guide, batch[0], 3))
        assert torch.equal(*found)


def test_a_weight_whose_pruned_weights_are_no_longer_0_is_dense():
    w = pruned(10, 20).detach()
    with_kept(w, w != 0).sub_(1)
    with sparse_layers("on") as layers:
        assert torch.equal(F.linear(X, w), F.linear(X, w.clone()))
    assert not layers.ways


def test_draws_made_without_gradients_may_be_leaves_that_have_them(model, batch):
    guide, mask, found = pl.guides.mean_field(model), masks_of(model), []
    with pl.handlers.sparsify(mask), torch.no_grad():
        draws = {name: value for name, value in guide().items() if name in model.initial_values()}
    for choice in ("on", "off"):
        weights = {name: value.requires_grad_() for name, value in draws.items()}
        with sparse_layers(choice), model.with_weights(weights):
            gradients = torch.autograd.grad(model.outputs(batch[0]).square().sum(), [weights[name] for name in mask])
        found.append([g * m for g, m in zip(gradients, mask.values(), strict=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert one.any()


@torch.inference_mode()
def test_draws_that_were_changed_in_inference_mode_are_read_anew(model, batch):
    guide, found = pl.guides.mean_field(model), []
    with pl.handlers.sparsify(masks_of(model)):
        draws = {name: value for name, value in guide().items() if name in model.initial_values()}
    for value in draws.values():
        value.add_(1)
    for choice in ("on", "off"):
        with sparse_layers(choice), model.with_weights(draws):
            found.append(model.outputs(batch[0]))
    torch.testing.assert_close(*found)


def test_draws_of_a_pruned_guide_are_saved_as_other_tensors(model, tmp_path):
    with pl.handlers.sparsify(masks_of(model)), torch.no_grad():
        draws = dict(pl.guides.mean_field(model)())
    assert kept_of(draws["first.weight"]) is not None
    torch.save(draws, tmp_path / "draws.pt")
    loaded = torch.load(tmp_path / "draws.pt", weights_only=True)
    for found in (loaded, copy.deepcopy(draws)):
        assert all(torch.equal(found[name], value) for name, value in draws.items())
        assert all(kept_of(value) is None for value in found.values())
