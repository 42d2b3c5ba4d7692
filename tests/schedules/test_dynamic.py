"""Dynamic sparse training: which weights are exchanged, counted by hand, and how many."""

import math

import pytest
import torch
from torch import Size

import pyro_lottery as pl
from pyro_lottery import masks, schedules
from tests.schedules.test_moving import run
from tests.support import same


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
def test_every_move_exchanges_the_lowest_for_the_largest_gradients_and_keeps_each_count(make, tiny_data, half_mask):
    score = pl.scores.snr if make is pl.guides.mean_field else pl.scores.magnitude
    own, seen = schedules.Dynamic(score), []

    class Kept:
        def move(self, at):
            seen.append((at, own.move(at)))
            return seen[-1][1]

    *_, last = run(Kept(), tiny_data, 3, make, half_mask)
    counts = {name: int(mask.sum()) for name, mask in half_mask.items()}
    assert counts == {name: int(mask.sum()) for name, mask in last.items()}
    exchanged = []
    for at, moved in seen:
        fraction = 0.3 * (1 + math.cos(math.pi * at.progress)) / 2
        for name, mask in moved.items():
            before = at.mask[name]
            gone, new = before & ~mask, mask & ~before
            assert int(mask.sum()) == counts[name]
            assert int(new.sum()) == int(gone.sum()) == int(fraction * counts[name])
            if bool(gone.any()):
                values = score(at.posterior)[name]
                assert values[gone].max() <= values[before & mask].min()
            exchanged.append(int(new.sum()))
    assert sum(exchanged) > 0


def test_the_weights_that_come_have_the_largest_gradient_of_a_difference_quotient(tiny_data, half_mask):
    """The gradient of pruned weights, one by one, by central differences; without noise, so that it is one number."""
    seen = []

    class Kept:
        def move(self, at):
            seen.append((at, schedules.Dynamic(pl.scores.magnitude).move(at)))
            return at.mask

    run(Kept(), tiny_data, 3, pl.guides.deterministic, half_mask)
    at, moved = seen[0]
    torch.manual_seed(0)
    name = "conv.weight"
    examples = next(at.context.batches())
    values = {n: v.double() for n, v in at.posterior.loc.items()}
    quotients = torch.zeros_like(values[name]).flatten()
    for place in range(quotients.numel()):
        for sign in (1, -1):
            shifted = {n: v.clone() for n, v in values.items()}
            shifted[name].view(-1)[place] += sign * 1e-4
            quotients[place] += sign * at.loss(shifted, examples) / 2e-4
    pruned = ~at.mask[name].flatten()
    new = (moved[name] & ~at.mask[name]).flatten()
    assert bool(new.any())
    assert quotients[new].abs().min() >= quotients[pruned & ~new].abs().max() * (1 - 1e-6)


def test_the_signal_to_noise_ratio_of_the_absolute_weight_ranks_as_snr_does():
    """SSVI's criterion E|w|/√Var|w| of w ~ N(μ, σ²) rises with |μ|/σ, by the folded normal distribution's moments."""
    ratio = torch.linspace(0, 12, 2000).double()
    mean = math.sqrt(2 / math.pi) * (-(ratio**2) / 2).exp() + ratio * torch.erf(ratio / math.sqrt(2))
    found = mean / (1 + ratio**2 - mean**2).sqrt()
    assert bool((found.diff() > 0).all())


def test_erdos_renyi_by_hand():
    shapes = {"a": Size([2, 3]), "b": Size([10, 20]), "c": Size([4, 5, 3, 3])}
    found = schedules.erdos_renyi(shapes, 0.25, seed=3)
    # ⌈0.25 · 386⌉ = 97 weights; shares 5, 30, 15 of 50: a would have 9.7 of its 6, so it is dense, and b and c share 91.
    assert {name: int(mask.sum()) for name, mask in found.items()} == {"a": 6, "b": 61, "c": 30}
    assert same(found, schedules.erdos_renyi(shapes, 0.25, seed=3))
    assert not same(found, schedules.erdos_renyi(shapes, 0.25, seed=4))
    assert masks.remaining(schedules.erdos_renyi(shapes, 0.999, seed=0)) == 386
    assert masks.remaining(schedules.erdos_renyi(shapes, 1e-9, seed=0)) == 1
