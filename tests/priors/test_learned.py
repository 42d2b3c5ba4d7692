import contextlib
import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_lottery as pl
from pyro_lottery import sites
from tests.priors.learnable import KINDS, learnable
from tests.support import TinyNet


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
    torch.testing.assert_close(terms.tempered_kl, expected)
    (wanted,) = torch.autograd.grad(expected, parameter)
    (found,) = torch.autograd.grad(terms.tempered_kl, parameter)
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
            r"must be an nn\.Parameter created outside the prior function",
        ),
        (
            lambda site, shape: dist.Normal(0.0, nn.Parameter(torch.tensor(0.0)).exp()),
            r"must be an nn\.Parameter created outside the prior function",
        ),
        (Stray(), "must be a parameter of the prior module"),
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
