import pytest
import torch
import torch.nn.functional as F

from pyro_lottery.kernels import native, norm, sparse
from pyro_lottery.kernels.batch_last import (
    activations,
    in_batch_last,
    in_channels_last,
    is_batch_last,
    planes,
    turned,
)
from pyro_lottery.kernels.pattern import Pattern

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))

LAYERS = {
    "3x3": dict(out=8, into=6, size=3, padding=1, image=(9, 7), n=16),
    "3x3 stride 2": dict(out=8, into=6, size=3, padding=1, stride=2, image=(9, 7), n=32),
    "1x1": dict(out=8, into=6, size=1, image=(5, 5), n=48),
    "1x1 stride 2": dict(out=8, into=6, size=1, stride=2, image=(8, 8), n=20),
    "5x5": dict(out=8, into=6, size=5, padding=2, image=(9, 9), n=13),
    "7x7 stride 2": dict(out=10, into=12, size=7, padding=3, stride=2, image=(16, 16), n=33),
    "dilated": dict(out=8, into=6, size=3, dilation=2, image=(9, 9), n=17),
    "depthwise": dict(out=8, into=8, size=3, padding=1, groups=8, image=(8, 8), n=64),
    "groups, stride 2": dict(out=8, into=8, size=3, padding=1, stride=2, groups=4, image=(8, 8), n=64),
    "image of two pixels": dict(out=8, into=6, size=3, padding=1, image=(2, 2), n=64),
    "padding wider than the image": dict(out=8, into=6, size=5, padding=3, image=(1, 2), n=5),
    "only padding": dict(out=8, into=6, size=2, padding=1, dilation=2, image=(1, 1), n=3),
    "one example": dict(out=8, into=6, size=3, padding=1, image=(9, 7), n=1),
    "blocks of channels": dict(out=80, into=50, size=3, padding=1, image=(8, 8), n=64),
    "blocks of channels, stride 2, groups": dict(
        out=64, into=96, size=3, padding=1, stride=2, groups=2, image=(9, 8), n=64, density=0.7
    ),
    "large tiles": dict(out=4, into=3, size=3, padding=1, image=(6, 40), n=40),
}


def layer(out, into, size, image, n, padding=0, stride=1, dilation=1, groups=1, density=0.3):
    mask = torch.rand(out, into // groups, size, size) < density
    mask[0] = False  # an empty filter
    x, weight, bias = torch.randn(n, into, *image), torch.randn(mask.shape) * mask, torch.randn(out)
    return mask, x, weight, bias, ((stride,) * 2, (padding,) * 2, (dilation,) * 2), groups


def kept(weight, mask):
    return weight.permute(0, 2, 3, 1)[mask.permute(0, 2, 3, 1)]


def run(mask, x, weight, bias, geometry, groups, grad):
    x, values, bias = x.clone().requires_grad_(), kept(weight, mask).requires_grad_(), bias.clone().requires_grad_()
    y = sparse.convolution(x, values, bias, Pattern(mask, groups), *geometry)
    return y.detach(), *torch.autograd.grad(y, (x, values, bias), grad)


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_and_its_gradients_are_those_of_double_precision(name):
    mask, x, weight, bias, geometry, groups = layer(**LAYERS[name])
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = torch.conv2d(*exact, *geometry, groups)
    grad = torch.randn_like(y).float()
    of_x, of_weight, of_bias = torch.autograd.grad(y, exact, grad.double())
    for got, expected in zip(
        run(mask, x, weight, bias, geometry, groups, grad), (y, of_x, kept(of_weight, mask), of_bias), strict=True
    ):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_channels_are_in_blocks_whose_inputs_stay_in_the_cache():
    mask, x, _, _, geometry, _ = layer(**LAYERS["blocks of channels"])
    pattern = Pattern(mask)
    one = sparse.Layer(pattern, x.shape[2:], len(x), *geometry)
    rows, blocks, taps = one._tables(False)[1].sizes
    assert (rows, taps) == (80, 9)
    assert 1 < blocks < 50
    few = Pattern(mask & (torch.rand(mask.shape) < 0.01))  # too few weights for blocks
    assert sparse.Layer(few, x.shape[2:], len(x), *geometry)._tables(False)[1].sizes == (80, 1, 9)


def test_directional_derivatives_are_finite_differences():
    mask, x, weight, bias, geometry, groups = layer(**LAYERS["3x3 stride 2"])
    pattern, values = Pattern(mask), kept(weight, mask)
    y = sparse.convolution(x, values, bias, pattern, *geometry)
    grad, step = torch.randn_like(y), 2.0**-4  # the layer is linear in each argument, so a step may be large
    _, of_x, of_values, of_bias = run(mask, x, weight, bias, geometry, groups, grad)
    for arguments, gradient, number in ((x, of_x, 0), (values, of_values, 1), (bias, of_bias, 2)):
        direction = torch.randn_like(arguments)
        ends = [[x, values, bias] for _ in range(2)]
        ends[0][number], ends[1][number] = arguments + step * direction, arguments - step * direction
        up, down = (sparse.convolution(*end, pattern, *geometry) for end in ends)
        slope = ((up - down).double() * grad).sum() / (2 * step)
        torch.testing.assert_close((gradient.double() * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_what_is_empty_is_exact():
    mask, x, weight, bias, geometry, groups = layer(**LAYERS["3x3"])
    y, of_x, of_values, of_bias = run(mask, x, weight, bias, geometry, groups, torch.ones(16, 8, 9, 7))
    assert (y[:, 0] == bias[0]).all()
    nothing = torch.zeros_like(mask)
    y, of_x, of_values, of_bias = run(nothing, x, weight, bias, geometry, groups, torch.ones(16, 8, 9, 7))
    assert torch.equal(y, bias[:, None, None].expand_as(y))
    assert not of_x.any()
    assert of_values.shape == (0,)
    assert torch.equal(of_bias, torch.full((8,), 16.0 * 9 * 7))


@pytest.mark.parametrize("name", ["3x3", "7x7 stride 2", "large tiles", "blocks of channels"])
def test_the_number_of_threads_changes_no_bit(name):
    arguments = layer(**LAYERS[name])
    grad, found, threads = (
        torch.randn_like(torch.conv2d(*arguments[1:4], *arguments[4], arguments[5])),
        [],
        torch.get_num_threads(),
    )
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(run(*arguments, grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("n", "into", "out"), [(1, 5, 3), (65, 40, 33), (300, 64, 128)])
def test_a_linear_layer_and_its_gradients_are_those_of_double_precision(n, into, out):
    mask = torch.rand(out, into) < 0.2
    x, weight, bias = torch.randn(n, into), torch.randn(out, into) * mask, torch.randn(out)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.linear(*exact)
    grad = torch.randn_like(y).float()
    of_x, of_weight, of_bias = torch.autograd.grad(y, exact, grad.double())
    mine = [t.clone().requires_grad_() for t in (x, weight[mask], bias)]
    got = sparse.linear(*mine, Pattern(mask))
    assert got.is_contiguous()
    for a, b in zip((got, *torch.autograd.grad(got, mine, grad)), (y, of_x, of_weight[mask], of_bias), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (32, 32), (65, 97)])
def test_a_transpose_moves_every_number(shape):
    matrix = torch.randn(shape)
    assert torch.equal(turned(matrix), matrix.t())
    assert turned(matrix).is_contiguous()


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("strange", [False, True], ids=["fp32", "fp64 in part"])
def test_layouts_are_turned_into_each_other_with_their_gradients(n, strange):
    x = (
        torch.randn(n, 33, 4, 3, dtype=torch.float64)[:, ::3].requires_grad_()
        if strange
        else torch.randn(n, 33, 4, 3, requires_grad=True)
    )
    last = in_batch_last(x)
    again = in_channels_last(last)
    assert torch.equal(last, x)
    assert torch.equal(again, x)
    assert is_batch_last(last) == (n > 1)
    assert n == 1 or again.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    for y in (last, again):
        assert torch.equal(torch.autograd.grad(y, x, grad, retain_graph=True)[0], grad)
    assert torch.equal(F.relu(in_batch_last(x * 1), inplace=True), F.relu(x)), "nobody forbids to change it in place"


def test_relus_work_in_place_on_a_convolution():
    mask, x, weight, bias, geometry, groups = layer(**LAYERS["3x3"])
    values = kept(weight, mask).requires_grad_()
    y = sparse.convolution(x, values, bias, Pattern(mask, groups), *geometry)
    found = torch.autograd.grad(F.relu(y, inplace=True).square().sum(), values)[0]
    weight.requires_grad_()
    y = torch.conv2d(x, weight, bias, *geometry, groups)
    expected = torch.autograd.grad(F.relu(y).square().sum(), weight)[0]
    torch.testing.assert_close(found, kept(expected, mask), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_activations_keep_their_values_in_the_batch_last_layout(layout):
    x = torch.randn(5, 3, 4, 2).contiguous(memory_format=layout)
    moved = activations(planes(x))
    assert torch.equal(moved, x)
    assert is_batch_last(moved)
    assert not is_batch_last(x)
    assert planes(moved).data_ptr() == moved.data_ptr()


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_and_its_gradients_are_those_of_double_precision(affine):
    x = torch.randn(7, 5, 3, 4) * 3 + 100
    weight, bias = (torch.randn(5), torch.randn(5)) if affine else (None, None)
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(exact[0], None, None, exact[1], exact[2], training=True, eps=1e-3)
    grad = torch.randn_like(y)
    mine = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    got, mean, variance = norm.batch_norm(*mine, 1e-3)
    torch.testing.assert_close(got, y.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.double().var((0, 2, 3), unbiased=False).float(), rtol=1e-5, atol=1e-5)
    needed = [t for t in exact if t is not None], [t for t in mine if t is not None]
    expected, found = torch.autograd.grad(y, needed[0], grad), torch.autograd.grad(got, needed[1], grad.float())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)
