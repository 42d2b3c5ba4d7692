"""The barrier between two minima of a function that is known."""

import math

import pytest
import torch

from pyro_lottery import diagnostics
from pyro_lottery.types import Posterior


def at(loc, scale=None, **net):
    return Posterior({"w": torch.tensor(loc)}, None if scale is None else {"w": torch.tensor(scale)}, ("w",)), net


def test_a_double_well_by_hand():
    def loss(posterior, net):
        return float((posterior.loc["w"] ** 2 - 1).pow(2).sum())

    found = diagnostics.barrier(at([-1.0]), at([1.0]), loss)
    assert found.height == pytest.approx(1.0)
    assert found.at[5] == 0.5
    assert diagnostics.barrier(at([1.0]), at([1.0]), loss).height == 0.0
    assert diagnostics.barrier(at([0.0]), at([2.0]), lambda p, n: float(p.loc["w"] * 3), 3).losses == (0.0, 3.0, 6.0)


def test_a_loss_that_is_no_number_is_no_barrier_of_0():
    assert math.isnan(diagnostics.Barrier((0.0, 0.5, 1.0), (0.3, math.nan, 0.3)).height)


def test_scales_are_interpolated_geometrically_and_counts_stay():
    seen = []
    a = at([0.0, 0.0], [1.0, 0.0], mean=torch.tensor([0.0]), count=torch.tensor(3))
    b = at([2.0, 4.0], [4.0, 2.0], mean=torch.tensor([1.0]), count=torch.tensor(9))
    diagnostics.barrier(a, b, lambda p, net: seen.append((p, net)) or 0.0, 3)
    (first, _), (middle, net), (last, _) = seen
    assert first.scale["w"].tolist() == [1.0, 0.0]
    assert middle.scale["w"].tolist() == [2.0, 1.0], "linearly where the weight is pruned at one end"
    assert middle.loc["w"].tolist() == [1.0, 2.0]
    assert last.scale["w"].tolist() == [4.0, 2.0]
    assert net["mean"].tolist() == [0.5]
    assert int(net["count"]) == 3
