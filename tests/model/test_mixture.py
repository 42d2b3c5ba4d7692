import math

import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch

import pyro_lottery as pl
from pyro_lottery.model.mixture import Mixture

LIKE = torch.zeros(0)


def mixture(*likelihoods):
    return Mixture(likelihoods, LIKE)


def normals(*pairs):
    return mixture(*(dist.Normal(torch.tensor([[m]]), torch.tensor([[s]])).to_event(1) for m, s in pairs))


def test_moments_of_a_mixture_by_hand():
    found = normals((1.0, 0.5), (3.0, 1.5))
    assert found.num_samples == 2
    assert found.mean.tolist() == [[2.0]]
    assert found.epistemic.tolist() == [[1.0]]
    assert found.aleatoric.item() == pytest.approx(math.sqrt((0.25 + 2.25) / 2))
    assert found.total.item() ** 2 == pytest.approx(found.aleatoric.item() ** 2 + found.epistemic.item() ** 2)
    assert normals((1.0, 0.5)).epistemic.item() == 0
    samples = found.samples(20_000)
    assert samples.shape == (20_000, 1, 1)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.05)
    assert samples.std().item() == pytest.approx(found.total.item(), rel=0.03)


def test_log_prob_is_of_the_mean_density():
    found = normals((1.0, 0.5), (3.0, 1.5))
    density = sum(scipy.stats.norm(m, s).pdf(2.2) for m, s in ((1.0, 0.5), (3.0, 1.5))) / 2
    assert found.log_prob(torch.tensor([[2.2]])).tolist() == pytest.approx([math.log(density)])
    with pytest.raises(
        pl.UserError, match=r"targets have shape \(1,\), but the likelihood has shape \(1, 1\); use y\[:, None\]"
    ):
        found.log_prob(torch.tensor([2.2]))
    assert found.log_prob(torch.tensor([[math.nan]])).isnan().all()
    counts = mixture(dist.Poisson(torch.tensor([2.0, 3.0, 4.0])))
    log_prob = counts.log_prob(torch.tensor([1, -1, 4]))
    assert log_prob.tolist() == pytest.approx([scipy.stats.poisson(2).logpmf(1), -math.inf, scipy.stats.poisson(4).logpmf(4)])  # fmt: skip
    assert counts.log_prob(torch.tensor([1.5, 0.0, 0.0]))[0] == -math.inf


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (lambda: dist.Normal(torch.tensor([1e6]), torch.tensor([0.5])), scipy.stats.norm(1e6, 0.5)),
        (lambda: dist.Laplace(torch.tensor([-3.0]), torch.tensor([2.0])), scipy.stats.laplace(-3, 2)),
        (lambda: dist.Cauchy(torch.tensor([0.0]), torch.tensor([1e-3])), scipy.stats.cauchy(0, 1e-3)),
        (lambda: dist.LogNormal(torch.tensor([0.5]), torch.tensor([2.0])), scipy.stats.lognorm(2, scale=math.exp(0.5))),
        (lambda: dist.Gamma(torch.tensor([0.5]), torch.tensor([3.0])), scipy.stats.gamma(0.5, scale=1 / 3)),
        (lambda: dist.HalfNormal(torch.tensor([3.0])), scipy.stats.halfnorm(scale=3)),
        (lambda: dist.Exponential(torch.tensor([1e-4])), scipy.stats.expon(scale=1e4)),
    ],
)
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_of_one_draw_are_the_quantiles(make, theirs, level):
    lower, upper = mixture(make()).interval(level)
    expected = theirs.ppf([(1 - level) / 2, (1 + level) / 2])
    assert [lower.item(), upper.item()] == pytest.approx(expected.tolist(), rel=2e-5)


def test_an_interval_of_several_draws_is_that_of_their_mixture():
    pairs = ((-40.0, 0.01), (1.0, 3.0), (1.0, 0.1))
    for found, level in zip(normals(*pairs).interval(0.6), (0.2, 0.8), strict=True):
        root = scipy.optimize.brentq(
            lambda v, p=level: sum(scipy.stats.norm(*pair).cdf(v) for pair in pairs) / 3 - p, -60, 60
        )
        assert found.item() == pytest.approx(root, rel=1e-5)
    for wrong in (0, 1, 95, -0.5, math.nan, "a"):
        with pytest.raises(pl.UserError, match="the level of an interval must be between 0 and 1"):
            normals(*pairs).interval(wrong)
    broken = mixture(dist.Normal(torch.tensor([math.nan, 0.0]), 1.0, validate_args=False))
    assert broken.interval()[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("likelihood", "theirs", "within"),
    [
        (dist.StudentT(4.0, torch.tensor([2.0]), torch.tensor([3.0])), scipy.stats.t(4, 2, 3), 0.6),
        (dist.Poisson(torch.tensor([12.0])), scipy.stats.poisson(12), 1),
        (dist.NegativeBinomial(torch.tensor([5.0]), probs=torch.tensor([0.4])), scipy.stats.nbinom(5, 0.6), 1),
        (dist.Bernoulli(torch.tensor([0.1])), scipy.stats.bernoulli(0.1), 0),
        (dist.Uniform(torch.tensor([1.0]), torch.tensor([3.0])), scipy.stats.uniform(1, 2), 0.05),
    ],
)
def test_intervals_without_a_distribution_function_are_from_samples(likelihood, theirs, within):
    before = torch.get_rng_state()
    lower, upper = mixture(likelihood).interval(0.9)
    assert [lower.item(), upper.item()] == pytest.approx(theirs.ppf([0.05, 0.95]).tolist(), abs=within)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(mixture(likelihood).interval(0.9)[0], lower), "the same every time"


def test_what_has_no_mean_is_nan():
    wide = mixture(dist.Cauchy(torch.tensor([0.0]), 1.0))
    assert wide.mean.isnan().all()
    logistic = mixture(
        dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [dist.transforms.SigmoidTransform()])
    )
    assert logistic.mean.isnan().tolist() == [True, True]
    assert logistic.aleatoric.isnan().all()
    found = logistic.log_prob(torch.tensor([0.5, 1.5])).tolist()
    assert found == pytest.approx([-0.5 * math.log(2 * math.pi) + math.log(4), -math.inf])
    upper = logistic.interval(0.5)[1]
    assert upper.tolist() == pytest.approx([1 / (1 + math.exp(-scipy.stats.norm.ppf(0.75)))] * 2)


def test_angles_have_no_mean_on_the_line():
    found = mixture(dist.VonMises(torch.zeros(3), 2.0), dist.VonMises(torch.ones(3), 2.0))
    assert all(each.isnan().all() for each in (found.mean, found.aleatoric, found.total))
