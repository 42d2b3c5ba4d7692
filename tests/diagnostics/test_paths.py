"""Weights on paths, beside a search through the layers."""

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import diagnostics, nets, scores
from tests.scores.test_context import context_of


def reached(weights):
    """The weights of a stack of linear layers, bool [out, in] each, from which there is a way to input and output."""
    forward = [torch.ones(weights[0].shape[1], dtype=torch.bool)]
    for weight in weights:
        forward.append((weight & forward[-1]).any(1))
    backward = [torch.ones(weights[-1].shape[0], dtype=torch.bool)]
    for weight in reversed(weights):
        backward.append((weight & backward[-1][:, None]).any(0))
    backward.reverse()
    return [w & forward[i] & backward[i + 1][:, None] for i, w in enumerate(weights)]


@pytest.mark.parametrize("seed", range(5))
def test_a_stack_of_layers_by_search(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.GELU(),
        nn.Linear(8, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    model = pl.BayesianClassifier(net, num_data=4)
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    data = pl.data.from_tensors(x, y, x, y, normalize=False).train
    names = ["0.weight", "2.weight", "5.weight"]
    mask = {n: torch.rand(model.initial_values()[n].shape) < 0.2 for n in names}
    found = diagnostics.on_paths(context_of(model, data, mask))
    expected = reached([*mask.values(), torch.ones(3, 5, dtype=torch.bool)])
    for name, value in zip(names, expected, strict=False):
        assert torch.equal(found[name], value)
    assert sum(int(m.sum()) for m in found.values()) < sum(int(m.sum()) for m in mask.values())


def test_nothing_counts_where_a_layer_is_empty():
    torch.manual_seed(0)
    model = pl.BayesianClassifier(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), num_data=4
    )
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    data = pl.data.from_tensors(x, y, x, y, normalize=False).train
    mask = {"0.weight": torch.ones(8, 6, dtype=torch.bool), "2.weight": torch.zeros(8, 8, dtype=torch.bool)}
    assert not any(bool(m.any()) for m in diagnostics.on_paths(context_of(model, data, mask)).values())


@pytest.mark.parametrize("arch", ["lenet", "resnet20", "vgg11", "vit_tiny"])
def test_all_weights_of_a_dense_network_count(arch):
    torch.manual_seed(0)
    channels, size = (1, 8) if arch == "lenet" else (3, 32)
    model = pl.BayesianClassifier(
        nets.create_model(arch, 10, channels, size, 8 if arch == "vit_tiny" else None), num_data=4
    )
    x, y = torch.randint(0, 255, (4, channels, size, size), dtype=torch.uint8), torch.arange(4)
    data = pl.data.from_tensors(x, y, x, y).train
    found = diagnostics.on_paths(context_of(model, data))
    assert all(bool(mask.all()) for mask in found.values())
    assert scores.SCORES  # the context is that of scores
