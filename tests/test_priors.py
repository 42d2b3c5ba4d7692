import contextlib
import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_lottery as pl
from pyro_lottery import priors, sites
from tests.support import TinyNet


def test_one_number_is_the_scale_and_two_are_loc_and_scale():
    for make in (priors.normal, priors.laplace):
        one, two = make(2.0)("w", torch.Size([1])), make(0.5, 2.0)("w", torch.Size([1]))
        assert (one.loc, one.scale, two.loc, two.scale) == (0.0, 2.0, 0.5, 2.0)
    assert priors.student_t(2.0, df=5.0)("w", torch.Size([1])).df == 5.0


def test_a_prior_may_differ_by_site():
    def prior(site, shape):
        return torch_normal(0.5 if site == "hidden.weight" else 2.0)

    from pyro.distributions import Normal

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
    for wrong in (
        priors.student_t, priors.flat, dist.Normal, lambda site: dist.Normal(0.0, 1.0), lambda site, shape: None,
        torch.distributions.Normal(0.0, 1.0),
    ):  # fmt: skip
        with pytest.raises(
            pl.UserError, match=r"the prior of 'conv\.weight' .*; a prior must be a pyro\.distributions object"
        ):
            pl.BayesianClassifier(TinyNet(), wrong, num_data=1)


def test_tensors_of_a_transformed_prior_are_in_the_state_dict():
    from pyro.distributions.transforms import AffineTransform

    shifted = dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [AffineTransform(torch.tensor(0.5), torch.tensor(2.0))]
    )
    prior = pl.BayesianClassifier(TinyNet(), shifted, num_data=1).net.conv.weight_prior
    found = sorted(float(value) for name, value in prior.state_dict().items())
    assert found == [0.0, 0.5, 1.0, 2.0]
    prior.double()
    assert prior.distribution.transforms[0].loc.dtype == torch.double


def test_a_dict_of_globs_where_the_first_match_counts():
    prior = {"conv.*": priors.laplace(0.1), "*.weight": dist.Normal(0.0, 2.0), "*": priors.normal(3.0)}
    found = scales(pl.BayesianClassifier(TinyNet(), prior, num_data=1))
    expected = {
        "conv.weight": 0.1, "conv.bias": 0.1, "hidden.weight": 2.0, "hidden.bias": 3.0, "out.weight": 2.0, "out.bias": 3.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_globs_that_do_not_fit_are_named():
    for prior, message in [
        (
            {"*.wieght": priors.normal(1.0), "*": priors.normal(1.0)},
            r"glob '\*\.wieght' matches no site; similar names: .*weight",
        ),
        ({"*.weight": priors.normal(1.0)}, r"no glob of the prior matches site 'conv\.bias'; add '\*'"),
        ({"*": 3}, "a prior must be a pyro.distributions object, or a function .* got 3"),
        (3, "a prior must be a pyro.distributions object, or a function .* got 3"),
        (
            {"*": priors.normal(1.0), "conv.*": priors.laplace(1.0)},
            r"glob 'conv\.\*' is never used, since '\*' comes first",
        ),
        ({}, r"no glob of the prior matches site 'conv\.weight'"),
    ]:
        with pytest.raises(pl.UserError, match=message):
            pl.BayesianClassifier(TinyNet(), prior, num_data=1)


def test_fan_in_scales_by_the_inputs_of_a_layer():
    found = scales(pl.BayesianClassifier(TinyNet(), priors.fan_in(2.0), num_data=1))
    assert found["conv.weight"] == pytest.approx(2 / 3)  # 1 channel of 3×3
    assert found["hidden.weight"] == pytest.approx(2 / 4)  # 16 inputs
    assert found["hidden.bias"] == 2


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

    model = pl.BayesianClassifier(TinyNet(), priors.mixture(1.0, 0.1), num_data=60)
    guide = pl.guides.auto(getattr(autoguide, kind), model) if kind else pl.guides.mean_field(model)
    history = pl.train(model, guide, tiny_data, epochs=2, milestones=())
    assert np.isfinite(history[-1]["loss"])


class LearnedScale(nn.Module):
    """A prior with parameters of its own: the scale's logarithm, shared by all sites."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-0.7))

    def forward(self, site, shape):
        return dist.Normal(0.0, self.log_scale.exp())


class ConstrainedScale(PyroModule):
    """The same in Pyro's manner."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(-0.7).exp(), dist.constraints.positive)

    def forward(self, site, shape):
        return dist.Normal(0.0, self.scale)


def learnable(kind):
    """A prior N(0, s²) with s = e^-0.7 to be learned, its parameter, and s as a function of that."""
    if kind == "module":
        module = LearnedScale()
        return module, module.log_scale, torch.exp
    if kind == "PyroModule":
        module = ConstrainedScale()
        return module, module.scale_unconstrained, torch.exp
    if kind == "function":
        log_scale = nn.Parameter(torch.tensor(-0.7))
        return (lambda site, shape: dist.Normal(0.0, log_scale.exp())), log_scale, torch.exp
    scale = nn.Parameter(torch.tensor(-0.7).exp())
    prior = dist.Normal(0.0, scale)
    return (prior if kind == "distribution" else lambda site, shape: dist.Normal(0.0, scale)), scale, lambda s: s


KINDS = ("distribution", "leaf", "function", "module", "PyroModule")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [False, True])
def test_the_kl_of_a_learnable_prior_and_its_gradient(kind, mask, half_mask, tiny_data):
    prior, parameter, scale_of = learnable(kind)
    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60, kl_temperature=0.1)
    assert [p is parameter for p in model.prior_parameters()] == [True]
    assert sum(p is parameter for p in model.parameters()) == 1
    guide = pl.guides.mean_field(model, init_scale=0.3)
    with pl.handlers.sparsify(half_mask) if mask else contextlib.nullcontext():
        terms = pl.ELBO().terms(model, guide, tiny_data.test[:4], tiny_data.test.labels[:4])
    posterior, kept = pl.posterior(guide), half_mask if mask else {}
    loc, scale = (
        torch.cat([t[kept.get(n, torch.ones_like(t)).bool()] for n, t in part.items()])
        for part in (posterior.loc, posterior.scale)
    )
    q, p = torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0, scale_of(parameter))
    expected = 0.1 * torch.distributions.kl_divergence(q, p).sum()
    torch.testing.assert_close(terms.kl, expected)
    (wanted,) = torch.autograd.grad(expected, parameter)
    (found,) = torch.autograd.grad(terms.kl, parameter)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["distribution", "module"])
def test_a_learned_scale_is_that_of_empirical_bayes(kind, tiny_data):
    """With q held fixed, the best s² is the mean of μ² + σ² over all weights."""
    prior, parameter, scale_of = learnable(kind)
    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model, init_scale=0.3).requires_grad_(False)
    loss, args = pl.ELBO()(model, guide), (tiny_data.test[:4], tiny_data.test.labels[:4])
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.95**step
        optimizer.zero_grad()
        loss(*args).backward()
        optimizer.step()
    found = pl.posterior(guide)
    best = torch.cat([(found.loc[n] ** 2 + found.scale[n] ** 2).flatten() for n in found.loc]).mean().sqrt()
    assert float(scale_of(parameter.detach())) == pytest.approx(float(best), rel=0.01)


@pytest.mark.parametrize(("kind", "loss"), [*((kind, pl.ELBO) for kind in KINDS), ("module", Trace_ELBO)])
def test_pyros_svi_learns_a_scale(kind, loss, tiny_data):
    prior, parameter, scale_of = learnable(kind)
    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60)
    guide = pl.guides.mean_field(model, init_scale=0.3).requires_grad_(False)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.95}), loss=loss())
    for _ in range(80):
        svi.step(tiny_data.test[:4], tiny_data.test.labels[:4])
    found = pl.posterior(guide)
    best = torch.cat([(found.loc[n] ** 2 + found.scale[n] ** 2).flatten() for n in found.loc]).mean().sqrt()
    assert float(scale_of(parameter.detach())) == pytest.approx(float(best), rel=0.05)


def test_empirical_bayes_of_a_regression_is_the_maximum_of_the_evidence():
    """y = Xw + noise with orthogonal columns: the best s² solves s² = mean(μ² + σ²) with the exact posterior of that s."""
    x, _ = torch.linalg.qr(torch.randn(40, 6))
    x, noise = 8 * x, 0.5
    y = x @ torch.randn(6, 1) * 0.4 + noise * torch.randn(40, 1)
    s2 = torch.tensor(1.0)
    for _ in range(100):
        precision = (x**2).sum(0) / noise**2 + 1 / s2
        s2 = (((x.mT @ y).squeeze(1) / noise**2 / precision) ** 2 + 1 / precision).mean()
    scale = nn.Parameter(torch.tensor(2.0))
    net = nn.Linear(6, 1, bias=False)
    model = pl.BayesianRegressor(net, dist.Normal(0.0, scale), num_data=40, noise_scale=noise)
    guide = pl.guides.mean_field(model, init_scale=0.1)
    optimizer = torch.optim.Adam([*guide.parameters(), *model.parameters()], 0.05)
    elbo = pl.ELBO(estimator="local")
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.99**step
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, x, y).backward()
        optimizer.step()
    assert scale.item() == pytest.approx(float(s2.sqrt()), rel=0.02)


def test_training_learns_a_prior_without_weight_decay_and_a_rewind_restores_it(tiny_data):
    scale = nn.Parameter(torch.tensor(0.5))
    wide = nn.Parameter(torch.tensor(5.0), requires_grad=False)
    prior = {"out.bias": dist.Normal(0.0, wide), "*": dist.Normal(0.0, scale)}
    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model, init_scale=0.3)
    decayed, rest = pl.guides.parameter_groups(model, guide, 0.1)
    assert any(p is scale for p in rest["params"])
    assert not any(p is scale for p in decayed["params"])
    assert rest["weight_decay"] == 0
    before = model.net_state()
    assert before["conv.weight_prior.scale"] == 0.5
    assert "out.bias_prior.scale" not in before
    pl.train(model, guide, tiny_data, epochs=3, lr=0.01, milestones=())
    assert abs(scale.item() - 0.5) > 0.03
    assert wide == 5
    trained = model.net_state()
    model.load_net_state(before)
    assert scale == 0.5
    model.load_net_state(trained)
    assert scale == trained["hidden.bias_prior.scale"]
    with pytest.raises(pl.UserError, match=r"net/hidden\.bias_prior\.scale is missing"):
        model.load_net_state({n: t for n, t in trained.items() if "hidden.bias" not in n})
    assert not model.prior_of("conv.weight").scale.requires_grad
    assert sites.describe(model, guide)[0]["prior"].startswith("Normal(")


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_learnable_prior_has_parameters_of_its_own(kind):
    prior, parameter, scale_of = learnable(kind)
    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60)
    if kind == "function":
        with pytest.raises(pl.UserError, match=r"prior of 'conv\.weight' is a function of nn\.Parameters.*nn\.Module"):
            copy.deepcopy(model)
        return
    twin = copy.deepcopy(model)
    (own,) = twin.prior_parameters()
    assert own is not parameter
    with torch.no_grad():
        own.fill_(1.5)
    assert twin.prior_of("out.bias").scale == scale_of(torch.tensor(1.5))
    assert model.prior_of("out.bias").scale == scale_of(parameter.detach())
    model.double()
    assert model.net.conv.weight_prior().base_dist.scale.dtype == torch.double


def test_a_learnable_prior_that_cannot_be_learned_is_refused():
    scale, free = nn.Parameter(torch.tensor(1.0)), torch.tensor(1.0, requires_grad=True)

    class Stray(nn.Module):
        def forward(self, site, shape):
            return dist.Normal(0.0, scale.exp())

    for prior, message in [
        (
            dist.Normal(0.0, scale.exp()),
            r"conv\.weight' has a tensor computed from one that requires a gradient; use a function",
        ),
        (dist.Normal(0.0, free), r"conv\.weight' has a tensor that requires a gradient; make it an nn\.Parameter"),
        (
            lambda site, shape: dist.Normal(0.0, free.exp()),
            r"is not an nn\.Parameter created outside the prior function",
        ),
        (
            lambda site, shape: dist.Normal(0.0, nn.Parameter(torch.tensor(0.0)).exp()),
            r"is not an nn\.Parameter created outside the prior function",
        ),
        (Stray(), "is not a parameter of the prior module"),
        (lambda site, shape: dist.Normal(0.0, pyro.param("s", torch.tensor(1.0))), r"calls pyro\.param\('s'\)"),
        (
            lambda site, shape: dist.Normal(0.0, pyro.sample("s", dist.HalfNormal(1.0), obs=torch.tensor(1.0))),
            r"the prior of 'conv\.weight' observes 's'",
        ),
        (
            lambda site, shape: dist.Normal(0.0, pyro.sample("out.bias", dist.HalfNormal(1.0))),
            r"the prior of 'conv\.weight' samples 'out\.bias', which is the name of another site",
        ),
        (
            lambda site, shape: dist.Normal(0.0, pyro.sample("s", dist.HalfNormal(float(len(shape))))),
            "two priors sample 's' from different distributions",
        ),
    ]:
        net = TinyNet()
        with pytest.raises(pl.UserError, match=message):
            pl.BayesianClassifier(net, prior, num_data=1)
        assert isinstance(net.conv.weight, nn.Parameter), "the network was left as it was"
        pyro.clear_param_store()


def test_a_ticket_holds_a_learned_prior(tmp_path, tiny_data):
    def network(value):
        scale = nn.Parameter(torch.tensor(value))
        model = pl.BayesianClassifier(TinyNet(), dist.Normal(0.0, scale), num_data=60)
        return model, pl.guides.mean_field(model), scale

    model, guide, _ = network(0.5)
    start = pl.posterior(guide)
    pl.Ticket(pl.masks.full(start), start, model.net_state()).save(tmp_path / "ticket.safetensors")
    other, its_guide, its_scale = network(2.0)
    other.start_from_(its_guide, pl.Ticket.load(tmp_path / "ticket.safetensors"))
    assert its_scale == 0.5
    plain = pl.BayesianClassifier(TinyNet(), num_data=60)
    with pytest.raises(pl.UserError, match=r"ticket belongs to another network.*net/conv\.bias_prior\.scale"):
        plain.start_from_(pl.guides.mean_field(plain), pl.Ticket.load(tmp_path / "ticket.safetensors"))


def orthogonal_regression():
    """Inputs whose halves have orthogonal columns each, so that every posterior is mean-field, and targets."""
    halves = [torch.linalg.qr(torch.randn(20, 3))[0] * torch.tensor([8.0, 4.0, 2.0]) for _ in range(2)]
    x = torch.cat(halves)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.5 * torch.randn(40, 1)


def test_the_posterior_of_one_half_as_prior_of_the_other_gives_the_posterior_of_all():
    x, y = orthogonal_regression()
    noise, width = 0.5, 0.7
    model = pl.BayesianRegressor(nn.Linear(3, 1, bias=False), priors.normal(width), num_data=20, noise_scale=noise)
    guide = pl.guides.mean_field(model, init_scale=0.1)
    elbo = pl.ELBO(estimator="local")

    def learn(x, y):
        optimizer = torch.optim.Adam(guide.parameters(), 0.1)
        for step in range(250):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.975**step
            optimizer.zero_grad()
            elbo.differentiable_loss(model, guide, x, y).backward()
            optimizer.step()

    learn(x[:20], y[:20])
    model.set_prior_(priors.from_posterior(pl.posterior(guide)))
    assert pl.ELBO().terms(model, guide, x[20:], y[20:]).kl.item() == pytest.approx(0, abs=1e-5)
    learn(x[20:], y[20:])
    precision = (x**2).sum(0) / noise**2 + 1 / width**2
    loc = (x.mT @ y).squeeze(1) / noise**2 / precision
    found = pl.posterior(guide)
    exact = precision.rsqrt()
    assert ((found.loc["weight"][0] - loc).abs() < 0.3 * exact).all()
    torch.testing.assert_close(found.scale["weight"][0], exact, rtol=0.05, atol=0)


def test_the_posterior_of_a_pruned_network_is_a_prior(half_mask, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=0.3)
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    with pl.handlers.sparsify(half_mask):
        pruned = pl.masks.apply(half_mask, pl.posterior(guide))
        tiny_model.set_prior_(priors.from_posterior(pruned))
        assert pl.ELBO().terms(tiny_model, guide, *args).kl.item() == pytest.approx(0, abs=1e-4)
        pl.train(tiny_model, guide, tiny_data, epochs=1, milestones=())
    prior = tiny_model.prior_of("conv.weight")
    kept = half_mask["conv.weight"]
    assert torch.equal(prior.loc, pruned.loc["conv.weight"])
    assert (prior.scale[~kept] == 1).all()
    assert torch.equal(prior.scale[kept], pruned.scale["conv.weight"][kept])
    assert "net.conv.weight_prior.scale" in tiny_model.state_dict()


def test_a_prior_replaced_in_place_is_the_one_that_counts(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    other = pl.BayesianClassifier(TinyNet(), priors.laplace(0.3), num_data=60, kl_temperature=0.1)
    for prior in (priors.normal(0.1, 2.0), {"conv.*": priors.normal(0.5), "*": priors.normal(3.0)}):
        tiny_model.set_prior_(prior)
        other.set_prior_(prior)
        torch.manual_seed(0)
        kl = pl.ELBO().terms(tiny_model, guide, *args).kl
        torch.manual_seed(0)
        assert kl == pl.ELBO().terms(other, guide, *args).kl
    before = scales(tiny_model)
    for wrong, message in [
        ({"conv.*": priors.normal(0.5)}, "no glob of the prior matches"),
        ({"out.*": dist.Normal(torch.zeros(7), 1.0), "*": priors.normal(1.0)}, "does not broadcast"),
        (
            priors.from_posterior(pl.Posterior({"a": torch.ones(1)}, {"a": torch.ones(1)}, ())),
            r"has no site 'conv\.weight'",
        ),
    ]:
        with pytest.raises(pl.UserError, match=message):
            tiny_model.set_prior_(wrong)
        assert scales(tiny_model) == before
    with pytest.raises(pl.UserError, match="a point guide's posterior has no scales"):
        priors.from_posterior(pl.posterior(pl.guides.deterministic(tiny_model)))


ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
REAL = {
    "Normal": dist.Normal(ZERO, ONE),
    "Laplace": dist.Laplace(ZERO, ONE),
    "Cauchy": dist.Cauchy(ZERO, ONE),
    "StudentT": dist.StudentT(torch.tensor(3.0), ZERO, ONE),
    "Gumbel": dist.Gumbel(ZERO, ONE),
    "Gumbel of numbers": dist.Gumbel(0.0, 1.0),
    "Logistic": dist.Logistic(ZERO, ONE),
    "SkewLogistic": dist.SkewLogistic(ZERO, ONE, torch.tensor(2.0)),
    "AsymmetricLaplace": dist.AsymmetricLaplace(ZERO, ONE, torch.tensor(1.5)),
    "Stable": dist.Stable(torch.tensor(1.5), ZERO, ONE, ZERO),
    "StableWithLogProb": dist.StableWithLogProb(torch.tensor(1.5), ZERO, ONE, ZERO),
    "VonMises": dist.VonMises(ZERO, ONE),
    "mixture": dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2))),
    "scaled": dist.TransformedDistribution(dist.Normal(ZERO, ONE), [dist.transforms.AffineTransform(ZERO, 2 * ONE)]),
    "negated": dist.TransformedDistribution(dist.Gumbel(ZERO, ONE), [dist.transforms.AffineTransform(0.0, -1.0)]),
    "masked": dist.Normal(ZERO, ONE).mask(True),
}


@pytest.mark.parametrize("name", REAL)
def test_every_distribution_over_the_reals_is_a_prior(name):
    """Its density is the one it was given, also after a move and a copy, dense and under a mask."""
    prior, x, y = REAL[name], torch.randn(8, 4), torch.randn(8, 2)
    for mask in ({}, {"0.weight": torch.rand(3, 4) < 0.5}):
        model = pl.BayesianRegressor(
            nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), prior, num_data=8, noise_scale=1.0
        )
        guide = pl.guides.mean_field(model, 0.1)
        with pl.handlers.sparsify(mask):
            pl.ELBO().differentiable_loss(model, guide, x, y).backward()
        assert guide.loc.grad.isfinite().all()
        value = torch.full((3, 4), 0.3)
        for each in (model, copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model).double()).float()):
            torch.testing.assert_close(each.prior_of("0.weight").log_prob(value).expand(3, 4), prior.log_prob(value))


def hyperprior(site, shape):
    """N(m, e^(2l)) with l for all sites and m for each."""
    log_scale = pyro.sample("log_scale", dist.Normal(-1.0, 0.5))
    return dist.Normal(pyro.sample(f"{site}.mean", dist.Normal(0.0, 0.2)), log_scale.exp())


def test_what_a_prior_samples_are_sites_of_the_model(tiny_data):
    model = pl.BayesianClassifier(TinyNet(), hyperprior, num_data=60, kl_temperature=0.1)
    hyper = ("log_scale", *(f"{site}.mean" for site in model.sites))
    assert set(model.hyper_sites) == set(hyper)
    assert model.independent_sites == ()
    trace = poutine.trace(model).get_trace(tiny_data.test[:4], tiny_data.test.labels[:4])
    drawn = [n for n, s in trace.nodes.items() if s["type"] == "sample" and n not in ("data", "y")]
    assert set(drawn) == {*hyper, *model.sites}
    assert {trace.nodes[n]["scale"] for n in drawn} == {0.1}
    value = {n: trace.nodes[n]["value"] for n in drawn}
    density = torch.distributions.Normal(-1.0, 0.5).log_prob(value["log_scale"])
    for site in model.sites:
        mean = value[f"{site}.mean"]
        density = density + torch.distributions.Normal(0.0, 0.2).log_prob(mean)
        density = density + torch.distributions.Normal(mean, value["log_scale"].exp()).log_prob(value[site]).sum()
    torch.testing.assert_close(trace.log_prob_sum(lambda name, site: name in drawn), 0.1 * density)

    mixed = pl.BayesianClassifier(TinyNet(), {"conv.*": hyperprior, "*": priors.normal(1.0)}, num_data=60)
    assert set(mixed.hyper_sites) == {"log_scale", "conv.weight.mean", "conv.bias.mean"}
    assert mixed.independent_sites == ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    with pytest.raises(pl.UserError, match=r"prior of 'conv\.weight' depends on log_scale, conv\.weight\.mean"):
        mixed.prior_of("conv.weight")
    assert sites.describe(mixed, pl.guides.mean_field(mixed))[0]["prior"] == "depends on other sites"
    mixed.set_prior_(priors.normal(1.0))
    assert (mixed.hyper_sites, mixed.independent_sites) == ((), mixed.sites)


def gradients(model, guide, x, y, estimator, sites):
    """Mean and standard error of 200 draws of the loss's gradient by loc and log-scale of sites, as one vector."""
    elbo = pl.ELBO(estimator=estimator)
    found = []
    for _ in range(200):
        loss = elbo.differentiable_loss(model, guide, x, y)
        parts = [guide.unpack(g) for g in torch.autograd.grad(loss, (guide.loc, guide.log_scale))]
        found.append(torch.cat([part[site].flatten() for part in parts for site in sites]))
    every = torch.stack(found)
    return every.mean(0), every.std(0) / len(found) ** 0.5


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_the_gradient_under_a_hyperprior_is_that_of_the_joint_density(estimator):
    """h ~ N(0, τ²), w ~ N(h, s²), y = Xw + noise is one Gaussian of h and w with mean μ and precision Λ: the gradient of
    the ELBO by loc is −Λ(loc − μ), by log scale 1 − Λᵢᵢ·scale².
    """
    x, y = torch.randn(20, 3), torch.randn(20, 1) + 1
    noise, width, hyper_width = 0.8, 0.5, 2.0
    precision = torch.zeros(4, 4)
    precision[0, 0] = 1 / hyper_width**2 + 3 / width**2
    precision[0, 1:] = precision[1:, 0] = -1 / width**2
    precision[1:, 1:] = x.mT @ x / noise**2 + torch.eye(3) / width**2
    mean = torch.linalg.solve(precision, torch.cat([torch.zeros(1, 1), x.mT @ y / noise**2])).squeeze(1)

    def prior(site, shape):
        return dist.Normal(pyro.sample("h", dist.Normal(0.0, hyper_width)), width)

    model = pl.BayesianRegressor(nn.Linear(3, 1, bias=False), prior, num_data=20, noise_scale=noise)
    guide = pl.guides.mean_field(model, init_scale=0.1)
    loc, scale = torch.tensor([1.5, -0.1, 0.4, 0.2]), torch.tensor([0.7, 0.2, 0.1, 0.3])
    at = [{"h": v[0], "weight": v[None, 1:]} for v in (loc, scale)]
    pl.guides.set_posterior_(guide, pl.Posterior(at[0], at[1], ()))
    expected = torch.cat([precision @ (loc - mean), precision.diagonal() * scale**2 - 1])
    found, error = gradients(model, guide, x, y, estimator, ("h", "weight"))
    assert ((found - expected).abs() < 4 * error + 1e-4).all()
    assert (error[[0, 4]] < 0.3 * expected[[0, 4]].abs()).all(), "the test can tell"


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_the_gradient_of_a_positive_hyperprior_is_that_of_its_integral(estimator):
    """w ~ N(0, s²), s half-Cauchy: the expectation over log s ~ N(m, v²) by Gauss-Hermite quadrature."""
    loc, deviation = torch.randn(5, 1) * 0.3, 0.1

    def prior(site, shape):
        return dist.Normal(0.0, pyro.sample("s", dist.HalfCauchy(1.0)))

    model = pl.BayesianRegressor(nn.Linear(1, 5, bias=False), prior, num_data=4, noise_scale=1.0)
    guide = pl.guides.mean_field(model)
    at = {"s": torch.tensor(-1.0), "weight": loc}, {"s": torch.tensor(0.1), "weight": torch.full((5, 1), deviation)}
    pl.guides.set_posterior_(guide, pl.Posterior(*at, ()))
    m, log_v = torch.tensor([-1.0], requires_grad=True), torch.tensor([0.1]).log().requires_grad_()
    points, weights = (torch.tensor(part).float() for part in np.polynomial.hermite_e.hermegauss(40))
    log_s = m + log_v.exp() * points
    density = torch.distributions.HalfCauchy(1.0).log_prob(log_s.exp()) + log_s
    second = (loc**2 + deviation**2).sum()
    density = density - 5 * log_s - second / (2 * (2 * log_s).exp())
    elbo = (density * weights).sum() / weights.sum() + log_v
    expected = -torch.cat(torch.autograd.grad(elbo.sum(), (m, log_v)))
    found, error = gradients(model, guide, torch.randn(4, 1), torch.randn(4, 5), estimator, ("s",))
    assert ((found - expected).abs() < 4 * error).all()
    assert (error < 0.1 * expected.abs().max()).all(), "the test can tell"
    assert (guide()["s"] > 0).all()


def test_pruning_leaves_hyperpriors_alone(tiny_data, half_mask, tmp_path):
    model = pl.BayesianClassifier(TinyNet(), hyperprior, num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model)
    assert set(model.prunable) == set(half_mask)
    start = pl.posterior(guide)
    with pl.handlers.sparsify(half_mask):
        history = pl.train(model, guide, tiny_data, epochs=1, milestones=())
        probs = pl.predict(model, guide, tiny_data.test, num_samples=2)
        pl.predict_mean(model, guide, tiny_data.test)
    assert np.isfinite(history[-1]["loss"])
    torch.testing.assert_close(probs.sum(-1), torch.ones(24))
    assert set(start.loc) == {*model.sites, *model.hyper_sites}
    assert set(pl.masks.full(start)) == set(half_mask)
    pl.Ticket(half_mask, start, model.net_state()).save(tmp_path / "ticket.safetensors")
    model.start_from_(guide, pl.Ticket.load(tmp_path / "ticket.safetensors"))
    assert torch.equal(pl.posterior(guide).loc["log_scale"], start.loc["log_scale"])
    twin = copy.deepcopy(model)
    assert twin.hyper_sites == model.hyper_sites


def test_predictions_under_a_positive_hyperprior(tiny_data, half_mask):
    def prior(site, shape):
        return dist.StudentT(3.0, 0.0, pyro.sample("s", dist.HalfNormal(1.0)))

    model = pl.BayesianClassifier(TinyNet(), prior, num_data=60, kl_temperature=0.1)
    guide = pl.guides.mean_field(model)
    with pl.handlers.sparsify(half_mask):
        pl.train(model, guide, tiny_data, epochs=2, milestones=())
        state = torch.get_rng_state()
        mean = pl.predict_mean(model, guide, tiny_data.test)
        assert torch.equal(torch.get_rng_state(), state)
        drawn = pl.predict(model, guide, tiny_data.test, num_samples=4)
    torch.testing.assert_close(mean, drawn, rtol=0, atol=0.2)
