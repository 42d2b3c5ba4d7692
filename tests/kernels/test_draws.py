"""Several draws in one pass have the outputs of one draw after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_lottery.handlers import sparse_layers
from pyro_lottery.kernels import native
from pyro_lottery.kernels.draws import Draws, NotTogether, at_once, by_draw, repeated
from pyro_lottery.kernels.kept import with_kept
from pyro_lottery.model.fixed import with_weights
from pyro_lottery.runs.packed_ticket import _Together

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def drawn(net, count, density=0.4):
    """Values of all parameters for each draw; matrices and filters are pruned by one mask."""
    masks = {name: torch.rand(p.shape) < density for name, p in net.named_parameters() if p.ndim > 1}
    draws = []
    for _ in range(count):
        values = {name: torch.randn(p.shape) / 3 for name, p in net.named_parameters()}
        for name, mask in masks.items():
            values[name] = with_kept(values[name] * mask, mask)
        draws.append(values)
    return draws


def one_by_one(net, draws, x):
    found = []
    for values in draws:
        with with_weights(net, values):
            found.append(net(x))
    return torch.stack(found)


def together(net, draws, x):
    stacked = {name: Draws([values[name] for values in draws]) for name in draws[0]}
    with sparse_layers("on"), with_weights(net, stacked):
        return by_draw(net(repeated(x)), len(draws))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=2)
        self.down = nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding=2)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = F.max_pool2d(x + self.second(x), 2)
        return self.out(self.down(x).relu().mean((2, 3)))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.hidden = nn.Linear(4 * 5 * 6, 7)
        self.norm = nn.BatchNorm1d(7)
        self.tokens = nn.Linear(7, 3)

    def forward(self, x):
        x = self.norm(self.hidden(self.conv(x).view(len(x), -1)))
        return self.tokens(x[:, None].repeat(1, 4, 1)).flatten(1)


@pytest.mark.parametrize("make", [Residual, Flat])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("count", [1, at_once()])
@torch.no_grad()
def test_draws_together_are_draws_one_by_one(make, images, count):
    net = make().eval()
    for buffer in net.buffers():
        if buffer.dtype == torch.float32:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    draws, x = drawn(net, count), torch.randn(images, 3, 7, 8)
    expected = one_by_one(net, draws, x)
    torch.testing.assert_close(together(net, draws, x), expected, rtol=1e-4, atol=1e-5)
    assert len(expected) == count


@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits():
    net = Residual().eval()
    draws, x = drawn(net, 5), torch.randn(2, 3, 7, 8)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(together(net, draws, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x):
        return x + self.weight


@pytest.mark.parametrize(
    ("net", "what"),
    [
        (Other(), "add"),
        (nn.LayerNorm([3, 7, 8]), "layer_norm"),
        (nn.BatchNorm2d(3).train(), "batch_norm"),
        (nn.Conv2d(3, 2, 3, padding="same"), "conv2d"),
        (nn.ConvTranspose2d(3, 2, 3), "conv_transpose2d"),
    ],
)
@torch.no_grad()
def test_what_only_one_draw_can_do_is_not_done_together(net, what):
    with pytest.raises(NotTogether, match=what):
        together(net, drawn(net, 2, density=1.0), torch.randn(1, 3, 7, 8))


def test_weights_of_other_types_are_not_taken():
    with pytest.raises(NotTogether, match=r"torch\.float64"):
        Draws([torch.zeros(3, dtype=torch.float64)])


class Patches(nn.Module):
    """Takes patches for images, which moves the examples of the batch apart."""

    def __init__(self):
        super().__init__()
        self.patch, self.out = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        return self.out(self.patch(patches).relu().view(len(x), -1, 8).mean(1))


class Whole(Patches):
    def forward(self, x):
        return self.out(self.patch(F.adaptive_avg_pool2d(x, 2).flatten(1)).relu())


@pytest.mark.parametrize(("make", "right"), [(Patches, False), (Whole, True)])
def test_a_network_that_moves_the_batch_gets_its_draws_one_by_one(make, right):
    net = make().eval()
    draws, asked = drawn(net, 10), []

    def apart(x):
        asked.append(len(x))
        return one_by_one(net, draws, x)

    pass_of_all = _Together(net, draws)
    for count in (2, 2, 3):
        assert not pass_of_all._is_refused(torch.randn(count, 3, 8, 8)), "no layer can see it"
        assert pass_of_all._is_right(apart, torch.Size((count, 3, 8, 8))) == right
        assert right or not pass_of_all.is_faster(apart, torch.randn(count, 3, 8, 8))
    assert asked[:2] == [2, 3], "once for a shape"
