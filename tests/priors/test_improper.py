import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import priors


def test_a_flat_prior_has_density_one_and_cannot_be_sampled():
    flat = priors.Flat().expand(torch.Size([2, 3])).to_event(2)
    assert flat.log_prob(torch.randn(2, 3)) == 0
    with pytest.raises(pl.UserError, match="flat prior"):
        flat.sample()
