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


class Residual(nn.Module):
    """A block that starts as the identity, as timm's."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        nn.init.zeros_(self.norm.weight)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.relu6(100 * self.stem(x))
        return self.head((x + self.norm(self.conv(x))).mean((2, 3)))


class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x).view(-1, 6, 2).amax(-1))


def frozen_and_negative():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight.fill_(-1.0)
    net[0].weight.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Residual, (1, 8, 8)),
        (lambda: nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)), (6,)),
        (Maxout, (6,)),
        (frozen_and_negative, (6,)),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)), (1, 4, 4)),
    ],
    ids=["gain of 0 and relu6", "layer norm", "maxout", "deterministic layer", "max pool"],
)  # fmt: skip
def test_what_is_switched_off_now_and_then_counts(make, shape):
    torch.manual_seed(0)
    x, y = torch.randn(4, *shape), torch.arange(4) % 3
    model = pl.BayesianClassifier(make(), num_data=4)
    found = diagnostics.on_paths(context_of(model, pl.data.from_tensors(x, y, x, y, normalize=False).train))
    assert found
    assert all(bool(mask.all()) for mask in found.values())


def test_a_network_of_tokens_and_one_without_prunable_weights():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(10, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(self.a(self.embed(x).mean(1)).relu())

    x, y = torch.randint(0, 10, (4, 7)), torch.arange(4) % 3
    data = pl.data.from_loaders([(x, y)], [(x, y)])
    with pytest.warns(UserWarning, match="densities count only the prunable weights"):
        model = pl.BayesianClassifier(Tokens(), num_data=4)
    found = diagnostics.on_paths(context_of(model, data.train))
    assert all(bool(mask.all()) for mask in found.values())
    last = pl.BayesianClassifier(nn.Sequential(nn.Linear(6, 3)), num_data=4)
    x = torch.randn(4, 6)
    assert diagnostics.on_paths(context_of(last, pl.data.from_tensors(x, y, x, y, normalize=False).train)) == {}


def test_a_network_that_needs_single_precision_is_one_line():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(self.a(x.float()))

    x, y = torch.randn(4, 6), torch.arange(4) % 3
    model = pl.BayesianClassifier(Single(), num_data=4)
    with pytest.raises(pl.UserError, match="the network cannot run in float64"):
        diagnostics.on_paths(context_of(model, pl.data.from_tensors(x, y, x, y, normalize=False).train))
