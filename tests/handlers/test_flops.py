import torch
import torch.nn.functional as F
from torch import nn

import pyro_lottery as pl
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


def test_queries_and_keys_of_other_lengths_are_counted_at_their_own_places():
    for size in (4, 6):  # with widths of their own, the projections are three weights
        attention = nn.MultiheadAttention(4, 2, bias=False, kdim=size, vdim=size, batch_first=True)
        with count_flops() as counted:
            attention(torch.randn(1, 3, 4), torch.randn(1, 10, size), torch.randn(1, 10, size))
        assert counted.total == 2 * (16 * 3 + 2 * 4 * size * 10 + 16 * 3)


def test_images_without_a_batch_are_one_image():
    with count_flops() as counted:
        nn.Conv2d(3, 5, 3)(torch.randn(3, 8, 8))
        nn.Conv1d(2, 4, 3)(torch.randn(2, 6))
        nn.ConvTranspose1d(2, 4, 3)(torch.randn(2, 6))
    assert counted.total == 2 * (3 * 5 * 9 * 36 + 2 * 4 * 3 * 4 + 2 * 4 * 3 * 6)


def test_what_checks_a_first_prediction_is_not_counted(tiny_model, tiny_data, half_mask):
    guide, found = pl.guides.mean_field(tiny_model), []
    for _ in range(2):
        with pl.handlers.sparsify(half_mask), count_flops() as counted:
            pl.predict_mean(tiny_model, guide, tiny_data.test)
        found.append(counted.total)
    assert found[0] == found[1] > 0
