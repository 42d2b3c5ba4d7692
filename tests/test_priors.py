import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_lottery as pl
from pyro_lottery import priors


def test_one_number_is_the_scale_and_two_are_loc_and_scale():
    for make in (priors.normal, priors.laplace):
        one, two = make(2.0)("w", torch.Size([1])), make(0.5, 2.0)("w", torch.Size([1]))
        assert (one.loc, one.scale, two.loc, two.scale) == (0.0, 2.0, 0.5, 2.0)
    assert priors.student_t(2.0, df=5.0)("w", torch.Size([1])).df == 5.0


def test_a_prior_may_differ_by_site():
    def prior(site, shape):
        return torch_normal(0.5 if site == "hidden.weight" else 2.0)

    from pyro.distributions import Normal

    from tests.conftest import TinyNet

    def torch_normal(scale):
        return Normal(torch.tensor(0.0), torch.tensor(scale))

    model = pl.BayesianClassifier(TinyNet(), prior, num_data=1)
    assert model.net.hidden.weight_prior().base_dist.scale.unique() == 0.5
    assert model.net.conv.weight_prior().base_dist.scale.unique() == 2.0


def test_parameters_of_a_prior_are_in_the_state_dict(tiny_model):
    tiny_model.net.conv.weight_prior.scale.fill_(7.0)
    assert tiny_model.state_dict()["net.conv.weight_prior.scale"] == 7.0


def test_by_name():
    assert priors.normal(scale=2.0)("w", torch.Size([1])).scale == priors.laplace(1.0, scale=2.0)("w", ()).scale == 2.0
    assert priors.by_name("laplace", 0.5)("w", torch.Size([1])).scale == 0.5
    assert priors.by_name("pyro_lottery.priors.flat", 1.0) is priors.flat
    with pytest.raises(pl.UserError, match="did you mean laplace"):
        priors.by_name("laplac", 1.0)
    with pytest.raises(pl.UserError, match="greater than 0"):
        priors.by_name("normal", 0.0)


def test_a_flat_prior_has_density_one_and_cannot_be_sampled():
    flat = priors.Flat().expand(torch.Size([2, 3])).to_event(2)
    assert flat.log_prob(torch.randn(2, 3)) == 0
    with pytest.raises(pl.UserError, match="flat prior"):
        flat.sample()


def test_any_distribution_per_weight_will_do():
    # The scale mixture of Bayes by Backprop, a distribution within a distribution, and one that already has the shape.
    from pyro import distributions as dist

    from tests.conftest import TinyNet

    def mixture(site, shape):
        weights = dist.Categorical(torch.tensor([0.25, 0.75]))
        return dist.MixtureSameFamily(weights, dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.0])))

    model = pl.BayesianClassifier(TinyNet(), mixture, num_data=1)
    prior = model.net.hidden.weight_prior
    value = torch.tensor(0.3)
    normal = torch.distributions.Normal(0.0, torch.tensor([0.1, 1.0]))
    expected = (torch.tensor([0.25, 0.75]) * normal.log_prob(value).exp()).sum().log()
    torch.testing.assert_close(prior().log_prob(value.expand(prior.shape)), expected * prior.shape.numel())
    assert {t.dtype for t in model.double().net.hidden.weight_prior.buffers()} == {torch.double}
    assert prior().base_dist.component_distribution.scale.dtype == torch.double

    whole = pl.BayesianClassifier(
        TinyNet(), lambda s, shape: dist.Normal(0.0, 1.0).expand(shape).to_event(), num_data=1
    )
    assert whole.net.conv.weight_prior().event_shape == (4, 1, 3, 3)


def test_a_prior_that_does_not_fit_is_named():
    from pyro import distributions as dist

    from tests.conftest import TinyNet

    for wrong, message in (
        (dist.Normal(torch.zeros(7), 1.0), r"prior of 'conv\.weight' does not broadcast to \(4, 1, 3, 3\)"),
        (dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), "a distribution per weight|does not broadcast"),
    ):
        with pytest.raises(pl.UserError, match=message):
            pl.BayesianClassifier(TinyNet(), lambda s, shape, wrong=wrong: wrong, num_data=1)


def scales(model):
    return {
        site: float(model.net.get_submodule(path).__getattr__(f"{name}_prior")().base_dist.scale.flatten()[0])
        for site, (path, name) in model._sites.items()
    }


def test_a_prior_that_is_no_distribution_is_named():
    from tests.conftest import TinyNet

    for wrong in (
        priors.student_t, priors.flat, dist.Normal, lambda site: dist.Normal(0.0, 1.0), lambda site, shape: None,
        torch.distributions.Normal(0.0, 1.0),
    ):  # fmt: skip
        with pytest.raises(
            pl.UserError, match=r"the prior of 'conv\.weight' .*; a prior is a pyro\.distributions object"
        ):
            pl.BayesianClassifier(TinyNet(), wrong, num_data=1)


def test_tensors_of_a_transformed_prior_are_in_the_state_dict():
    from pyro.distributions.transforms import AffineTransform

    from tests.conftest import TinyNet

    shifted = dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [AffineTransform(torch.tensor(0.5), torch.tensor(2.0))]
    )
    prior = pl.BayesianClassifier(TinyNet(), shifted, num_data=1).net.conv.weight_prior
    found = sorted(float(value) for name, value in prior.state_dict().items())
    assert found == [0.0, 0.5, 1.0, 2.0]
    prior.double()
    assert prior.distribution.transforms[0].loc.dtype == torch.double


def test_a_dict_of_globs_where_the_first_match_counts():
    from tests.conftest import TinyNet

    prior = {"conv.*": priors.laplace(0.1), "*.weight": dist.Normal(0.0, 2.0), "*": priors.normal(3.0)}
    found = scales(pl.BayesianClassifier(TinyNet(), prior, num_data=1))
    expected = {
        "conv.weight": 0.1, "conv.bias": 0.1, "hidden.weight": 2.0, "hidden.bias": 3.0, "out.weight": 2.0, "out.bias": 3.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_globs_that_do_not_fit_are_named():
    from tests.conftest import TinyNet

    for prior, message in [
        (
            {"*.wieght": priors.normal(1.0), "*": priors.normal(1.0)},
            r"glob '\*\.wieght' matches no site; near: .*weight",
        ),
        ({"*.weight": priors.normal(1.0)}, r"no glob of the prior matches site 'conv\.bias'; add '\*'"),
        ({"*": 3}, "a prior is a pyro.distributions object, or a function .* got 3"),
        (3, "a prior is a pyro.distributions object, or a function .* got 3"),
        (
            {"*": priors.normal(1.0), "conv.*": priors.laplace(1.0)},
            r"glob 'conv\.\*' is never reached, since '\*' comes first",
        ),
        ({}, r"no glob of the prior matches site 'conv\.weight'"),
    ]:
        with pytest.raises(pl.UserError, match=message):
            pl.BayesianClassifier(TinyNet(), prior, num_data=1)


def test_fan_in_scales_by_the_inputs_of_a_layer():
    from tests.conftest import TinyNet

    found = scales(pl.BayesianClassifier(TinyNet(), priors.fan_in(2.0), num_data=1))
    assert found["conv.weight"] == pytest.approx(2 / 3)  # 1 channel of 3×3
    assert found["hidden.weight"] == pytest.approx(2 / 4)  # 16 inputs
    assert found["hidden.bias"] == 2


def test_kl_of_a_mixture_prior_by_monte_carlo_is_its_integral():
    """KL(N(μ, σ²) ‖ π·N(0, a²) + (1−π)·N(0, b²)) without closed form, against numerical integration."""
    from scipy import integrate, stats

    from tests.conftest import TinyNet

    mean, scale, wide, narrow, weight = 0.3, 0.2, 1.0, 0.1, 0.25
    model = pl.BayesianClassifier(TinyNet(), priors.mixture(wide, narrow, weight), num_data=1)
    guide = pl.guides.mean_field(model)
    posterior = pl.posterior(guide)
    loc = {n: torch.full_like(t, mean) for n, t in posterior.loc.items()}
    pl.guides.set_posterior_(guide, pl.Posterior(loc, {n: torch.full_like(t, scale) for n, t in loc.items()}, ()))
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        draws = torch.stack([pl.ELBO("analytic").terms(model, guide, x, y).kl for _ in range(300)])

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

    from tests.conftest import TinyNet

    model = pl.BayesianClassifier(TinyNet(), priors.mixture(1.0, 0.1), num_data=60)
    guide = pl.guides.auto(getattr(autoguide, kind), model) if kind else pl.guides.mean_field(model)
    history = pl.train(model, guide, tiny_data, epochs=2, milestones=())
    assert np.isfinite(history[-1]["loss"])
