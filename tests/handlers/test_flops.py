import torch
import torch.nn.functional as F
from torch import nn

from pyro_lottery.handlers import count_flops


def test_layers_are_counted_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.ConvTranspose2d(8, 2, 2, stride=2),
        nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip
    with count_flops() as counted:
        net(torch.randn(1, 3, 8, 8))
    assert counted.total == 2 * (3 * 4 * 9 * 64 + 8 * 2 * 9 * 9 + 8 * 2 * 4 * 9 + 72 * 5)


def test_zeros_are_not_counted_and_every_example_is():
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    with count_flops() as counted:
        F.linear(torch.ones(7, 3), weight)
        F.linear(input=torch.ones(2, 5, 3), weight=weight)
    assert counted.total == 2 * 3 * (7 + 10)


def test_the_projections_of_attention_are_counted_at_every_token():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 5, 8)
    with count_flops() as counted:
        attention(x, x, x)
    assert counted.total == 2 * (3 * 64 + 64) * 5
