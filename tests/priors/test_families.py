import numpy as np
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import priors
from tests.priors.models import scales
from tests.support import TinyNet


def test_one_number_is_the_scale_and_two_are_loc_and_scale():
    for make in (priors.normal, priors.laplace):
        one, two = make(2.0)("w", torch.Size([1])), make(0.5, 2.0)("w", torch.Size([1]))
        assert (one.loc, one.scale, two.loc, two.scale) == (0.0, 2.0, 0.5, 2.0)
    assert priors.student_t(2.0, df=5.0)("w", torch.Size([1])).df == 5.0


def test_fan_in_scales_by_the_inputs_of_a_layer():
    found = scales(pl.BayesianClassifier(TinyNet(), priors.fan_in(2.0), num_data=1))
    assert found["conv.weight"] == pytest.approx(2 / 3)  # 1 channel of 3×3
    assert found["hidden.weight"] == pytest.approx(2 / 4)  # 16 inputs
    assert found["hidden.bias"] == 2


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Conv2d(8, 4, 3), 72), (nn.ConvTranspose2d(8, 4, 3), 72), (nn.ConvTranspose2d(4, 8, 3), 36),
        (nn.ConvTranspose1d(8, 4, 3, groups=4), 6),
    ],
)  # fmt: skip
def test_inputs_of_a_transposed_layer_are_what_its_outputs_sum(layer, inputs):
    x = torch.ones(1, layer.in_channels, *[9] * (layer.weight.ndim - 2))
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    net(x)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    assert float(layer(x).detach().max()) == inputs
    model = pl.BayesianClassifier(net, priors.fan_in(2.0), num_data=1)
    assert model.kaiming_scale["0.weight"] == model.kaiming_scale["0.bias"] == pytest.approx((2 / inputs) ** 0.5)
    torch.testing.assert_close(model.prior_of("0.weight").stddev.unique(), torch.tensor([2 / inputs**0.5]))


def test_kl_of_a_mixture_prior_by_monte_carlo_is_its_integral():
    """KL(N(μ, σ²) ‖ π·N(0, a²) + (1−π)·N(0, b²)) without closed form, against numerical integration."""
    from scipy import integrate, stats

    mean, scale, wide, narrow, weight = 0.3, 0.2, 1.0, 0.1, 0.25
    model = pl.BayesianClassifier(TinyNet(), priors.mixture(wide, narrow, weight), num_data=2)
    guide = pl.guides.mean_field(model)
    posterior = pl.posterior(guide)
    loc = {n: torch.full_like(t, mean) for n, t in posterior.loc.items()}
    pl.guides.set_posterior_(guide, pl.Posterior(loc, {n: torch.full_like(t, scale) for n, t in loc.items()}, ()))
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        draws = torch.stack([pl.ELBO("analytic").terms(model, guide, x, y).tempered_kl for _ in range(300)])

    def integrand(w):
        q, p = (
            stats.norm(mean, scale),
            weight * stats.norm.pdf(w, 0, wide) + (1 - weight) * stats.norm.pdf(w, 0, narrow),
        )
        return q.pdf(w) * (q.logpdf(w) - np.log(p))

    weights = sum(t.numel() for t in loc.values())
    expected = weights * integrate.quad(integrand, mean - 10 * scale, mean + 10 * scale, points=[0.0])[0]
    assert abs(float(draws.mean()) - expected) < 4 * float(draws.std()) / 300**0.5
    assert float(draws.std()) / 300**0.5 < 0.01 * expected, "the test can tell"


@pytest.mark.parametrize("kind", [None, "AutoNormal", "AutoLowRankMultivariateNormal", "AutoDelta"])
def test_every_guide_takes_a_mixture_prior(kind, tiny_data):
    from pyro.infer import autoguide

    model = pl.BayesianClassifier(TinyNet(), priors.mixture(1.0, 0.1), num_data=60)
    guide = pl.guides.auto(getattr(autoguide, kind), model) if kind else pl.guides.mean_field(model)
    history = pl.train(model, guide, tiny_data, epochs=2, milestones=())
    assert np.isfinite(history[-1]["loss"])


@pytest.mark.parametrize(
    "prior",
    [
        priors.normal, priors.laplace, priors.fan_in, lambda p: priors.student_t(1.0, p), lambda p: priors.mixture(1.0, 0.1, p / 2),
    ],
)  # fmt: skip
def test_a_parameter_is_not_frozen_in_silence(prior):
    with pytest.raises(
        pl.UserError, match="a parameter would be frozen at its value; to learn it, give a distribution"
    ):
        prior(torch.nn.Parameter(torch.tensor(1.0)))
