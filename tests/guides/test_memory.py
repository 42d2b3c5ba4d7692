"""The memory that a covariance needs."""

import pytest
from pyro.infer import autoguide as A
from torch import nn

import pyro_lottery as pl


def test_a_covariance_too_large_for_the_machine_says_what_it_needs():
    model = pl.BayesianClassifier(pl.create_model("resnet20", 10), num_data=1)
    # n = 270,906 weights: at its peak training holds sixteen n² numbers of 4 bytes
    n = sum(t.numel() for t in model.initial_values().values())
    with pytest.raises(pl.UserError, match=f"over {n:,} weights needs {64 * n * n / 2**30:,.1f} GiB to train"):
        pl.guides.auto(A.AutoMultivariateNormal, model)
    with pytest.raises(pl.UserError, match=f"over {n:,} weights needs"):
        pl.guides.auto(A.AutoLaplaceApproximation, model).laplace_approximation()
    wide = pl.BayesianRegressor(nn.Linear(2000, 2000, bias=False), num_data=1, noise_scale=1.0)
    with pytest.raises(pl.UserError, match=f"over 4,000,000 weights needs {26 * 4e6**2 / 2**30:,.1f} GiB"):
        pl.guides.auto(A.AutoStructured, wide)
