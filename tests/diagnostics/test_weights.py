"""What training made of the weights: counted by hand."""

import math

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import diagnostics
from pyro_lottery.handlers import sparsify
from pyro_lottery.types import Posterior
from tests.support import tiny


def of(loc, scale):
    names = {"a": torch.tensor(loc), "b": torch.tensor([[1.0]])}
    return Posterior(names, None if scale is None else {"a": torch.tensor(scale), "b": torch.tensor([[2.0]])}, ("a",))


MASK = {"a": torch.tensor([[True, True], [True, False]])}


def test_scales_and_signs_by_hand():
    start, trained = (
        of([[1.0, -1.0], [2.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]),
        of([[2.0, 0.5], [1.0, -3.0]], [[1.04, 0.94], [2.0, 9.0]]),
    )
    assert diagnostics.scales_moved(start, trained, MASK) == {"a": pytest.approx(2 / 3), "b": 0.0}
    assert diagnostics.signs_kept(start, trained, MASK) == {"a": pytest.approx(2 / 3)}
    assert math.isnan(diagnostics.signs_kept(start, trained, {"a": torch.zeros(2, 2, dtype=torch.bool)})["a"])
    with pytest.raises(pl.UserError, match="no scales"):
        diagnostics.scales_moved(start, of([[1.0, 1.0], [1.0, 1.0]], None), MASK)


def test_kl_is_that_of_the_loss(tiny_data, half_mask):
    model, guide = tiny()
    with sparsify(half_mask):
        expected = pl.ELBO().terms(model, guide, *tiny_data.train.head()).tempered_kl / model.kl_temperature
    found = diagnostics.kl_per_site(model, pl.posterior(guide), half_mask)
    assert math.fsum(found.values()) == pytest.approx(expected.item(), rel=1e-5)


def test_kl_without_a_closed_form_is_nan():
    torch.manual_seed(0)
    model = pl.BayesianClassifier(nn.Sequential(nn.Linear(3, 4)), pl.priors.student_t(3.0), num_data=5)
    assert all(
        math.isnan(v) for v in diagnostics.kl_per_site(model, pl.posterior(pl.guides.mean_field(model)), {}).values()
    )
