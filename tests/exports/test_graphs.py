import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery.exports import graphs


def randomised(net):
    """The network with statistics and factors of normalisation as after training."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return net.eval()


NETS = {
    "convolution": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), (2, 2, 6, 6), 0),
    "no bias": (nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)), (2, 2, 6, 6), 0),
    "groups": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), (2, 4, 6, 6), 0),
    "not affine": (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False)), (2, 2, 6, 6), 0),
    "linear": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (2, 4), 0),
    "linear over places": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (2, 4, 4), 1),
    "first": (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), (2, 2, 6, 6), 1),
    "after a relu": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)), (2, 2, 6, 6), 1),
}


@pytest.mark.parametrize("name", NETS)
def test_folding_changes_no_output(name):
    net, shape, left = NETS[name]
    net, x = randomised(net), torch.randn(shape)
    graph = graphs.graph_of(graphs.trace(net, x))
    folded = graphs.fold_(graph)
    torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-5)
    norms = [node for node in graph.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    assert (len(norms), len(folded)) == (left, 2 - 2 * left)  # a weight and a bias
    assert not any("running" in buffer for buffer, _ in graph.named_buffers()) or left


def test_an_output_that_goes_elsewhere_too_is_not_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    net, x = randomised(Net()), torch.randn(2, 2, 4, 4)
    graph = graphs.graph_of(graphs.trace(net, x))
    assert graphs.fold_(graph) == {}
    torch.testing.assert_close(graph(x), net(x))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_number_of_examples_is_free(count):
    net = randomised(pl.create_model("resnet20", 10, 3, 32))
    graph = graphs.graph_of(graphs.trace(net, torch.randn(2, 3, 32, 32)))
    graphs.fold_(graph)
    program = graphs.trace(graph, torch.randn(2, 3, 32, 32))
    x = torch.randn(count, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_network_that_computes_with_values_is_refused_in_one_line():
    class Net(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(pl.UserError, match=r"torch.export cannot trace this network \(") as error:
        graphs.trace(Net(), torch.randn(2, 3))
    assert "\n" not in str(error.value)
