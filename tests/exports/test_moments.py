import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl
from pyro_lottery.exports import graphs, moments
from pyro_lottery.exports.moments import Gaussian, Moments
from pyro_lottery.exports.networks import Pixels

aten = torch.ops.aten
DRAWS = 400_000


def rule(op, *args, **options):
    return moments.RULES[op](op, *args, **options)


def gaussian(*shape, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.double)
    return Gaussian(mean, spread * (torch.rand(shape, generator=generator, dtype=torch.double) + 0.1))


def draws(x, count=DRAWS, seed=1):
    noise = torch.randn((count, *x.mean.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return x.mean + x.var.sqrt() * noise


def agrees(found, values, rtol=0.02):
    """Whether moments are those of sampled values, within a few standard errors of these."""
    errors = 5 * values.std(0) / len(values) ** 0.5 + rtol * values.std(0)
    assert bool(((found.mean - values.mean(0)).abs() <= errors).all())
    torch.testing.assert_close(found.var, values.var(0), rtol=rtol, atol=0.01)


def test_a_layer_is_exact_by_hand():
    x, w = (
        Gaussian(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.0]])),
        Gaussian(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.25, 1.0]])),
    )
    b = Gaussian(torch.tensor([1.0]), torch.tensor([0.125]))
    found = rule(aten.linear.default, x, w, b)
    assert found.mean.tolist() == [[3.0]]  # 6 − 4 + 1
    # μ²v + σ²(m² + v): 9·0.5 + 0.25·4.5, then 0 + 1·1, and the bias
    assert found.var.tolist() == [[4.5 + 1.125 + 1.0 + 0.125]]


def test_a_random_bias_alone():
    b = Gaussian(torch.tensor([1.0, 0.0]), torch.tensor([0.125, 0.5]))
    found = rule(aten.linear.default, torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0], [4.0]]), b)
    assert found.mean.tolist() == [[3.0, 8.0], [4.0, 12.0]]
    assert found.var.tolist() == [[0.125, 0.5], [0.125, 0.5]]


@pytest.mark.parametrize("certain", ["x", "weight", "neither"])
def test_a_convolution_is_that_of_independent_products(certain):
    x, w = gaussian(1, 2, 3, 3), gaussian(2, 2, 3, 3, seed=3, spread=0.3)
    xs, ws = draws(x, 20_000), draws(w, 20_000, seed=2)
    if certain == "x":
        x, xs = x.mean, x.mean.expand_as(xs)
    if certain == "weight":
        w, ws = w.mean, w.mean.expand_as(ws)
    found = rule(aten.conv2d.default, x, w, None, [1, 1], [0, 0])
    values = torch.stack([F.conv2d(a, b) for a, b in zip(xs, ws, strict=True)])
    agrees(found, values, rtol=0.05)


def test_relu_is_that_of_a_censored_normal():
    m, s = 0.7, 1.3
    found = rule(aten.relu.default, Gaussian(torch.tensor([m]).double(), torch.tensor([s * s]).double()))
    normal = stats.norm(m, s)
    first = normal.expect(lambda v: v, lb=0)
    assert float(found.mean) == pytest.approx(first, rel=1e-6)
    assert float(found.var) == pytest.approx(normal.expect(lambda v: v * v, lb=0) - first**2, rel=1e-6)


@pytest.mark.parametrize("op", [aten.gelu.default, aten.silu.default, aten.tanh.default, aten.hardswish.default])
def test_other_activations_agree_with_samples(op):
    x = gaussian(5, spread=0.5)
    agrees(rule(op, x), op(draws(x)), rtol=0.05)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1)])
def test_max_pooling_agrees_with_samples(kernel, stride, padding):
    x = gaussian(1, 1, 5, 5)
    found = rule(aten.max_pool2d.default, x, [kernel], [stride], [padding])
    values = F.max_pool2d(draws(x, 50_000).flatten(0, 1), kernel, stride, padding)[:, None]
    assert found.mean.shape == values[0].shape
    agrees(found, values, rtol=0.2)  # each maximum of two is taken for a Gaussian


@pytest.mark.parametrize("side", [4, 5, 6, 7])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1), (2, 3, 1), (3, 3, 0)])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pooling_has_the_windows_of_torch(side, kernel, stride, padding, ceil_mode):
    x = torch.randn(2, 3, side, side + 1)
    found = rule(
        aten.max_pool2d.default, Gaussian(x, torch.zeros_like(x)), [kernel], [stride], [padding], [1], ceil_mode
    )
    torch.testing.assert_close(found.mean, F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode), rtol=0, atol=1e-5)


def test_padding_with_a_number_adds_no_variance():
    x = gaussian(1, 1, 2, 2)
    found = rule(aten.pad.default, x, [1, 1, 1, 1], "constant", -5.0)
    assert float(found.mean[0, 0, 0, 0]) == -5
    assert float(found.var.sum()) == float(x.var.sum())


def test_certain_values_stay_as_they_are():
    x = torch.randn(2, 1, 6, 6)
    certain = Gaussian(x, torch.zeros_like(x))
    for op, plain in ((aten.relu.default, F.relu(x)), (aten.gelu.default, F.gelu(x))):
        torch.testing.assert_close(rule(op, certain).mean, plain, rtol=0, atol=1e-5)
    pooled = rule(aten.max_pool2d.default, certain, [2], [2])
    torch.testing.assert_close(pooled.mean, F.max_pool2d(x, 2), rtol=0, atol=1e-5)


def test_points_have_the_moments_of_a_standard_normal():
    points = moments.normal_points(64, 10)
    torch.testing.assert_close(points.mean(0), torch.zeros(10), rtol=0, atol=1e-6)
    torch.testing.assert_close(points.square().mean(0), torch.ones(10))
    assert float(points.abs().max()) < 4


def test_a_network_of_layers_and_relus_agrees_with_draws():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    graph = graphs.graph_of(graphs.trace(net, torch.zeros(2, 1, 6, 6)))
    scales = {name: torch.full_like(p, 0.05) for name, p in net.named_parameters() if not name.startswith("1.")}
    variances = {name: s.square() for name, s in scales.items()}
    module = Moments(graph, variances, Pixels(torch.zeros(1), torch.ones(1)), 3)
    images = torch.randint(0, 256, (2, 1, 6, 6), dtype=torch.uint8)
    m, v = module.logits(images)
    outputs = []
    for _ in range(4000):
        weights = {n: p + scales[n] * torch.randn_like(p) if n in scales else p for n, p in net.named_parameters()}
        outputs.append(torch.func.functional_call(net, weights, (images.float() / 255,)).detach())
    torch.testing.assert_close(m.detach(), torch.stack(outputs).mean(0), rtol=0, atol=0.02)
    assert float((v.detach().sqrt() / torch.stack(outputs).std(0)).log().abs().max()) < math.log(1.3)


def test_a_weight_that_is_standardised_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = F.batch_norm(self.weight.reshape(1, 3, -1), None, None, training=True).reshape_as(self.weight)
            return self._conv_forward(x, weight, self.bias)

    net = nn.Sequential(Standardised(1, 3, 2), nn.Flatten()).eval()
    graph = graphs.graph_of(graphs.trace(net, torch.zeros(2, 1, 2, 2)))
    module = Moments(graph, {"0.weight": torch.ones(3, 1, 2, 2)}, Pixels(torch.zeros(1), torch.ones(1)), 3)
    with pytest.raises(pl.UserError, match=r"no rule for aten.batch_norm.default"):
        module(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


def test_an_operation_without_a_rule_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.flatten(1)).cumsum(1)

    net = Odd().eval()
    graph = graphs.graph_of(graphs.trace(net, torch.zeros(2, 1, 2, 2)))
    module = Moments(graph, {"layer.weight": torch.ones(3, 4)}, Pixels(torch.zeros(1), torch.ones(1)), 3)
    with pytest.raises(pl.UserError, match=r"no rule for aten.cumsum.default"):
        module(torch.from_numpy(np.zeros((1, 1, 2, 2), np.uint8)))
