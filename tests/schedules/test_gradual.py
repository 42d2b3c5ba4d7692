"""Gradual pruning: the density at every move is the formula's."""

import math

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import masks, schedules
from tests.schedules.test_moving import run


def test_the_density_falls_by_the_cube():
    schedule = schedules.Gradual(0.1, pl.scores.snr)
    assert [schedule.density_at(t) for t in (0.0, 0.5, 1.0)] == [1.0, pytest.approx(0.1 + 0.9 / 8), 0.1]


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
def test_every_move_has_the_density_of_the_formula_and_nothing_comes_back(make, tiny_data):
    score = pl.scores.snr if make is pl.guides.mean_field else pl.scores.magnitude
    own, seen = schedules.Gradual(0.15, score), []

    class Kept:
        def move(self, at):
            moved = own.move(at)
            seen.append((at, moved))
            return moved

    *_, last = run(Kept(), tiny_data, 3, make)
    total = masks.total(last)
    assert [masks.remaining(m) for _, m in seen] == [
        math.ceil((0.15 + 0.85 * (1 - t) ** 3) * total) for t in (0.25, 0.5, 0.75, 1.0)
    ]
    assert masks.remaining(last) == math.ceil(0.15 * total)
    for at, moved in seen:
        assert all(not bool((moved[n] & ~at.mask[n]).any()) for n in moved)
        values = {n: score(at.posterior)[n] for n in moved}
        gone = torch.cat([values[n][at.mask[n] & ~moved[n]] for n in moved])
        stay = torch.cat([values[n][moved[n]] for n in moved])
        assert gone.max() <= stay.min()


def test_a_weight_is_always_left():
    mask = {"w": torch.tensor([[True, True], [True, False]])}
    score = {"w": torch.tensor([[1.0, 2.0], [3.0, 9.0]])}
    assert masks.shrink_to(mask, score, 1)["w"].tolist() == [[False, False], [True, False]]
    assert masks.shrink_to(mask, score, 5)["w"].tolist() == mask["w"].tolist()
    with pytest.raises(pl.UserError, match="no weight would survive: 0 of 3 are to be left"):
        masks.shrink_to(mask, score, 0)
