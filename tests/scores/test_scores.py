import math

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import scores
from pyro_lottery.types import Posterior

P = Posterior({"w": torch.tensor([3.0, -4.0])}, {"w": torch.tensor([4.0, 0.5])}, ("w",))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("snr", [0.75, 8.0]),
        ("magnitude", [3.0, 4.0]),
        ("squared_sum", [5.0, math.sqrt(16.25)]),
        ("mean_over_variance", [3 / 16.000001, 4 / 0.250001]),
        ("squared_sum_log_scale", [9 + math.log(4) ** 2, 16 + math.log(0.5) ** 2]),
    ],
)
def test_formulas(name, expected):
    torch.testing.assert_close(scores.by_name(name)(P)["w"], torch.tensor(expected))


def test_random_follows_seed_and_level():
    draw = [scores.by_name("random", seed, level)(P)["w"] for seed, level in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[3])


def test_a_point_guide_has_no_snr():
    with pytest.raises(pl.UserError, match="use --score magnitude"):
        scores.snr(Posterior(P.loc, None, ("w",)))


def test_own_scores_and_what_is_none():
    mask = pl.masks.full(P)
    own = pl.masks.shrink(mask, {"w": P.loc["w"] / P.scale["w"] ** 2}, 0.5)  # 0.19 and -16
    assert own["w"].tolist() == [True, False]
    for wrong in (None, P.loc["w"], {"w": 1.0}, {"w": P.loc["w"].numpy()}):
        with pytest.raises(pl.UserError, match="a score must be a dict with one tensor per site, got"):
            pl.masks.shrink(mask, wrong, 0.5)


def test_names_and_import_paths():
    assert scores.by_name("pyro_lottery.scores.snr") is scores.snr
    with pytest.raises(pl.UserError, match="did you mean magnitude"):
        scores.by_name("magnitud")
    with pytest.raises(pl.UserError, match=r"--score no\.such cannot be imported"):
        scores.by_name("no.such")
