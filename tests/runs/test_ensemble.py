"""Levels that predict together."""

from dataclasses import replace

import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import metrics
from pyro_lottery.runs.ensemble import Ensemble
from tests.support import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("ensemble") / "run", levels=1)


def test_an_ensemble_is_the_mean_of_its_networks(run):
    levels, data = [run.level(0), run.level(1)], run.load_data()
    every = [level.load_model().predictive(data.test, 4, seed=3) for level in levels]
    found = pl.ensemble(levels)
    together = found.predictive(data.test, 4, seed=3)
    torch.testing.assert_close(together.probs, (every[0].probs + every[1].probs) / 2)
    torch.testing.assert_close(together.aleatoric, (every[0].aleatoric + every[1].aleatoric) / 2)
    assert together.num_samples == 8
    assert bool((together.epistemic >= -1e-6).all())
    assert torch.equal(found.predict(data.test, 4, seed=3), together.probs)
    differ = (every[0].probs.argmax(1) != every[1].probs.argmax(1)).double().mean()
    assert found.disagreement(data.test, 4, seed=3) == pytest.approx(float(differ))
    assert pl.ensemble(levels[:1]).disagreement(data.test) == 0.0


def test_of_three_networks_all_pairs_count(run):
    class Says:
        def __init__(self, *classes):
            self.classes = classes

        def predictive(self, x, num_samples, seed):
            probs = torch.nn.functional.one_hot(torch.tensor(self.classes), 3).float()
            return pl.prediction.Predictive(probs, torch.zeros(len(probs)), 1)

    three = Ensemble([Says(0, 0, 1, 2), Says(0, 1, 1, 2), Says(0, 2, 1, 1)])
    # Pairs differ at 1, 2 and 2 of four examples.
    assert three.disagreement(None) == pytest.approx((1 / 4 + 2 / 4 + 2 / 4) / 3)


def test_what_does_not_belong_together_is_refused(run, tmp_path):
    other = small_run(tmp_path / "other", levels=0, train_size=100, seed=1)
    pl.ensemble([run.level(0), other.level(0)])  # other images of the same data set, with the same normalisation
    other.shape = replace(other.shape, checksum=1)
    with pytest.raises(pl.UserError, match="was trained on other images than"):
        pl.ensemble([run.level(0), other.level(0)])
    with pytest.raises(pl.UserError, match="at least one level"):
        pl.ensemble([])
    for wrong in (run, [run], run.level(0)):
        with pytest.raises(pl.UserError, match="an ensemble needs a list of levels"):
            pl.ensemble(wrong)


def test_networks_of_other_classes_are_refused(run):
    one, data = run.level(0).load_model(), run.load_data()
    other = replace(one, classes=tuple(reversed(one.classes or tuple("abcdefghij"))))
    with pytest.raises(pl.UserError, match="other classes, or the same in another order"):
        pl.ensemble([replace(one, classes=tuple("abcdefghij")), replace(other, classes=tuple("jihgfedcba"))])
    pl.ensemble([one, run.level(1)]).predict(data.test)

    class Says:
        def __init__(self, classes):
            self.num_classes = classes

        def predictive(self, x, num_samples, seed):
            return pl.prediction.Predictive(torch.full((2, self.num_classes), 1 / self.num_classes), torch.zeros(2), 1)

    for ask in (Ensemble([Says(3), Says(10)]).predict, Ensemble([Says(3), Says(10)]).disagreement):
        with pytest.raises(pl.UserError, match="have 3 and 10 classes"):
            ask(None)


def test_the_deep_ensemble_equivalent_between_sizes():
    of_ensembles = [1.0, 0.8, 0.7]
    assert metrics.deep_ensemble_equivalent(1.2, of_ensembles) == 1.0
    assert metrics.deep_ensemble_equivalent(0.9, of_ensembles) == pytest.approx(1.5)
    assert metrics.deep_ensemble_equivalent(0.8, of_ensembles) == pytest.approx(2.0)
    assert metrics.deep_ensemble_equivalent(0.725, of_ensembles) == pytest.approx(2.75)
    assert metrics.deep_ensemble_equivalent(0.6, of_ensembles) == float("inf")
    assert metrics.deep_ensemble_equivalent(0.9, torch.tensor(of_ensembles)) == pytest.approx(1.5)
    assert metrics.deep_ensemble_equivalent(0.9, iter(of_ensembles)) == pytest.approx(1.5)
    for wrong in ((float("nan"), of_ensembles), (1.0, [float("inf"), 0.8]), (1.0, [])):
        with pytest.raises(pl.UserError, match="needs finite numbers"):
            metrics.deep_ensemble_equivalent(*wrong)
