import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_lottery as pl
from pyro_lottery import training
from tests.support import QUICK, tiny


def test_learning_rate_by_hand():
    rates = [training.learning_rate(e, 0, 10, 1e-3, (80, 120), 0) for e in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    warm = [training.learning_rate(e, s, 10, 1.0, (), 2) for e, s in ((0, 0), (0, 9), (1, 9), (2, 0))]
    assert warm == pytest.approx([0.05, 0.5, 1.0, 1.0])


def test_the_kl_column_is_the_untempered_kl(tiny_data):
    model, guide = tiny(kl_temperature=0.1)
    q = pl.posterior(guide)
    before = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(q.loc[s], q.scale[s]), torch.distributions.Normal(0.0, 1.0)
        ).sum()
        for s in q.loc
    )
    for row in pl.train(model, guide, tiny_data, **QUICK | {"epochs": 2, "lr": 1e-9}, kl_warmup_epochs=1):
        assert row["kl"] == pytest.approx(before.item(), rel=1e-5)
        assert row["kl_weight"] == pytest.approx({1: 0.05, 2: 0.1}[row["epoch"]] / 60)
        assert row["loss"] == pytest.approx(row["nll"] + row["kl_weight"] * row["kl"])
    assert model.kl_temperature == 0.1


@pytest.mark.parametrize(
    ("family", "estimator"),
    [
        (pl.guides.mean_field, "weights"),
        (pl.guides.mean_field, "local"),
        (lambda m: pl.guides.auto(AutoNormal, m), "weights"),
    ],
)
def test_an_epoch_of_the_kl_warm_up_has_the_bits_of_its_own_temperature(family, estimator, tiny_data):
    """A quarter of T in the first of two epochs: a power of two, by which no bit is rounded."""

    def trained(temperature, warmup):
        model, guide = tiny(family, kl_temperature=temperature)
        pl.train(model, guide, tiny_data, **QUICK | {"epochs": 1}, estimator=estimator, kl_warmup_epochs=warmup)
        return pl.posterior(guide).loc["hidden.weight"]

    assert torch.equal(trained(0.1, 2), trained(0.025, 0))
    assert not torch.equal(trained(0.1, 2), trained(0.1, 0))
