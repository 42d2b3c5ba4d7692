"""Scales come back to the last bit."""

import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import transform_to

from pyro_lottery.guides.preimage import preimage


@pytest.mark.parametrize("constraint", [constraints.softplus_positive, constraints.positive])
def test_every_scale_has_its_parameter_back(constraint):
    # Where softplus is near log 2 its arguments lie more densely than its values.
    transform = transform_to(constraint)
    scale = transform(torch.linspace(-0.3, 0.3, 40_000))
    assert torch.equal(transform(preimage(transform, scale)), scale)
