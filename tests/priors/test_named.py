import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import priors


def test_by_name():
    assert priors.normal(scale=2.0)("w", torch.Size([1])).scale == priors.laplace(1.0, scale=2.0)("w", ()).scale == 2.0
    assert priors.by_name("laplace", 0.5)("w", torch.Size([1])).scale == 0.5
    assert priors.by_name("pyro_lottery.priors.flat", 1.0) is priors.flat
    assert priors.by_name("tests.priors.test_named:test_by_name", 1.0) is test_by_name
    with pytest.raises(pl.UserError, match="did you mean laplace"):
        priors.by_name("laplac", 1.0)
    with pytest.raises(pl.UserError, match="greater than 0"):
        priors.by_name("normal", 0.0)
