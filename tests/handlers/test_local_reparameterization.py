import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_lottery as pl
from pyro_lottery import kernels
from pyro_lottery.handlers import local_reparameterization, sparsify

DRAWS = 4000


class Attention(nn.Module):
    """The attention of torch, which projects inside one function."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (3, 6)),
    "linear on tokens": (nn.Linear(6, 5), (2, 4, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "strided and grouped": (nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 7, 7)),
    "padding by name": (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 2, 5, 5)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2), (2, 3, 4, 4)),
}


def built(layer, scale=0.5):
    torch.manual_seed(3)
    model = pl.BayesianRegressor(layer, num_data=10, noise_scale=1.0)
    return model, pl.guides.mean_field(model, scale)


def noisy(model, guide, x):
    """The network's output for one draw under the handler."""
    with pyro.validation_enabled(False), local_reparameterization():
        trace = poutine.trace(guide).get_trace()
        with poutine.replay(trace=trace):
            return model.net(x)


@torch.no_grad()
def by_outputs(model, guide, x, draws=DRAWS):
    """[draws, ...]: every example has noise of its own, so that one pass over copies of ``x`` gives all draws."""
    return noisy(model, guide, x.repeat(draws, *[1] * (x.ndim - 1))).unflatten(0, (draws, len(x)))


@torch.no_grad()
def by_weights(layer, guide, x, mask, draws=DRAWS):
    """[draws, ...] by drawing plain weights, with nothing of this library but the guide's loc and scale."""
    posterior = pl.posterior(guide)
    found = []
    for _ in range(draws):
        weights = {s: posterior.loc[s] + posterior.scale[s] * torch.randn_like(v) for s, v in posterior.loc.items()}
        weights = {s: w * mask[s] if s in mask else w for s, w in weights.items()}
        found.append(torch.func.functional_call(layer, weights, x))
    return torch.stack(found)


@pytest.mark.parametrize("path", ["auto", "torch"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("name", LAYERS)
def test_mean_and_std_of_every_output_are_those_of_weight_samples(name, masked, path):
    layer, shape = LAYERS[name]
    model, guide = built(copy.deepcopy(layer))
    x = torch.randn(shape)
    mask = {site: torch.rand_like(v) < 0.5 for site, v in model.initial_values().items() if masked and v.ndim > 1}
    with sparsify(mask), kernels.using(path):
        local = by_outputs(model, guide, x)
    weights = by_weights(layer, guide, x, mask)
    std = weights.std(0)
    # 4 standard errors of a difference, and a little for the largest of many outputs
    assert ((local.mean(0) - weights.mean(0)).abs() <= 4.5 * std * (2 / DRAWS) ** 0.5 + 1e-6).all()
    assert ((local.std(0) - std).abs() <= 4.5 * std * (1 / DRAWS) ** 0.5 + 1e-6).all()


def test_a_linear_layers_outputs_are_uncorrelated_within_an_example_as_weight_samples_are():
    model, guide = built(nn.Linear(6, 4))
    x = torch.randn(2, 6)
    for values in (by_outputs(model, guide, x)[:, 0], by_weights(nn.Linear(6, 4), guide, x, {})[:, 0]):
        correlation = torch.corrcoef(values.T) - torch.eye(4)
        assert (correlation.abs() < 4 / DRAWS**0.5).all()


def test_examples_have_noise_of_their_own():
    model, guide = built(nn.Linear(6, 1))
    x = torch.randn(1, 6).expand(2, 6)
    a, b = by_outputs(model, guide, x).squeeze(-1).T
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / DRAWS**0.5


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 8, "vdim": 8}])
def test_attentions_projections_are_noisy_layers(options):
    layer = Attention(**options)
    model, guide = built(copy.deepcopy(layer), 0.01)
    x = torch.randn(2, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local = by_outputs(model, guide, x)
    # with small scales attention is nearly linear in the noise, so that its mean and std are those of weight samples
    weights = by_weights(layer, guide, x, {}, 1500)
    std = weights.std(0)
    assert ((local.mean(0) - weights.mean(0)).abs() < 5 * std * (2 / 1500) ** 0.5 + 1e-3).all()
    assert (local.std(0) / std).log().abs().mean() < 0.25
    with sparsify({s: torch.zeros_like(v, dtype=torch.bool) for s, v in model.initial_values().items()}):
        assert not noisy(model, guide, x).any()


@pytest.mark.parametrize("path", ["auto", "torch"])
def test_gradients_are_autograds_with_the_same_noise(path):
    model, guide = built(nn.Conv2d(2, 3, 3))
    x, grad = torch.randn(4, 2, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3)
    with kernels.using(path):
        out = noisy(model, guide, x)
        fused = torch.autograd.grad((out * grad).sum(), (x, guide.loc, guide.log_scale))
    loc, scale = guide.unpack(guide.loc), guide.unpack(guide.log_scale.exp())
    mean = nn.functional.conv2d(x, loc["weight"], loc["bias"])
    variance = nn.functional.conv2d(x.square(), scale["weight"].square(), scale["bias"].square())
    noise = ((out - mean) / variance.sqrt()).detach()
    plain = torch.autograd.grad(((mean + variance.sqrt() * noise) * grad).sum(), (x, guide.loc, guide.log_scale))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_filter_without_weights_gives_exact_zeros_and_finite_gradients():
    model, guide = built(nn.Conv2d(2, 3, 3, bias=False))
    mask = {"weight": torch.ones(3, 2, 3, 3, dtype=torch.bool)}
    mask["weight"][1] = False
    with sparsify(mask):
        out = noisy(model, guide, torch.randn(4, 2, 5, 5))
    assert not out[:, 1].any()
    assert (out[:, 0] != 0).all()
    out.square().sum().backward()
    for grad in (guide.loc.grad, guide.log_scale.grad):
        assert grad.isfinite().all()
        assert not guide.unpack(grad)["weight"][1].any()


def test_other_uses_of_a_weight_are_sampled_and_said_once():
    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    model, guide = built(Scaled(3, 2))
    x, handler = torch.randn(4, 3), local_reparameterization()

    def out():
        with handler:
            trace = poutine.trace(guide).get_trace()
            with poutine.replay(trace=trace):
                return model.net(x)

    with pytest.warns(UserWarning, match=r"site 'weight' is used by .*this weight and others like it are sampled"):
        found = out()
    assert not torch.equal(found, out())  # the filter for warnings makes a second one an error
    found.sum().backward()
    assert guide.unpack(guide.log_scale.grad)["weight"].any()


def test_elbo_is_the_same_in_expectation_and_the_kl_exactly(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, 0.05)
    tiny_model.eval()
    x, y = tiny_data.test[:8], tiny_data.test.labels[:8]
    nll = {}
    with torch.no_grad():
        for name in ("weights", "local"):
            elbo = pl.ELBO(estimator=name)
            terms = [elbo.terms(tiny_model, guide, x, y) for _ in range(600)]
            nll[name] = torch.stack([t.nll for t in terms])
            assert len({t.tempered_kl.item() for t in terms}) == 1
            assert terms[0].tempered_kl == pl.ELBO().terms(tiny_model, guide, x, y).tempered_kl
    a, b = nll["weights"], nll["local"]
    assert abs(a.mean() - b.mean()) < 4 * ((a.var() + b.var()) / 600) ** 0.5


@pytest.mark.parametrize("prior", [pl.priors.normal(0.7), pl.priors.student_t(1.0)])
def test_a_prior_without_closed_form_gets_a_weight_sample_for_its_kl(prior):
    torch.manual_seed(0)
    model = pl.BayesianRegressor(nn.Linear(4, 2), prior, num_data=8, noise_scale=1.0)
    guide = pl.guides.mean_field(model, 0.5)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    with torch.no_grad():
        local, weights = (
            torch.stack([pl.ELBO("monte_carlo", estimator=e).terms(model, guide, x, y).tempered_kl for _ in range(800)])
            for e in ("local", "weights")
        )
    assert local.std() > 0
    assert abs(local.mean() - weights.mean()) < 4 * ((local.var() + weights.var()) / 800) ** 0.5


def test_a_users_own_normal_guide_works_and_stock_autonormal_samples(tiny_model, tiny_data):
    @poutine.scale(scale=0.1)  # the KL temperature
    def guide(x=None, y=None):
        for site, value in tiny_model.initial_values().items():
            pyro.sample(site, dist.Normal(value, torch.full_like(value, 0.1)).to_event(value.ndim))

    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]
    mask = {"hidden.weight": torch.zeros(6, 16, dtype=torch.bool)}
    with torch.no_grad(), sparsify(mask):
        terms = pl.ELBO(estimator="local").terms(tiny_model, guide, x, y)
        assert terms.tempered_kl == pl.ELBO().terms(tiny_model, guide, x, y).tempered_kl


@pytest.mark.parametrize("path", ["auto", "torch"])
def test_bf16_outputs_have_the_right_moments(path):
    model, guide = built(nn.Linear(6, 5))
    x = torch.randn(500, 6)
    with kernels.using(path), torch.autocast("cpu", torch.bfloat16):
        out = noisy(model, guide, x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    loc, scale = guide.unpack(guide.loc.detach()), guide.unpack(guide.log_scale.detach().exp())
    mean = x @ loc["weight"].T + loc["bias"]
    std = (x.square() @ scale["weight"].square().T + scale["bias"].square()).sqrt()
    noise = (out.detach().float() - mean) / std
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 + 0.01
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5 + 0.01
    assert guide.log_scale.grad.isfinite().all()


def test_a_guide_without_a_normal_per_weight_is_said_to_be_sampled():
    model = pl.BayesianRegressor(nn.Sequential(nn.Linear(3, 2)), num_data=4, noise_scale=1.0)
    stock = pl.guides.auto(pyro.infer.autoguide.AutoNormal, model)
    elbo, x, y = pl.ELBO(estimator="local"), torch.randn(4, 3), torch.randn(4, 2)
    with pytest.warns(UserWarning, match=r"site '0\.weight_unconstrained' is an auxiliary draw for other sites"):
        elbo.terms(model, stock, x, y)
    elbo.terms(model, stock, x, y)  # not said again: a second warning would be an error here


def test_tokens_of_one_example_have_noise_of_their_own():
    # the same approximation as for a convolution's positions: weight samples would give both the same output
    model, guide = built(nn.Linear(6, 1, bias=False))
    x = torch.randn(1, 1, 6).expand(1, 2, 6)
    a, b = by_outputs(model, guide, x)[:, 0, :, 0].T
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / DRAWS**0.5


def test_precisions_of_mean_and_variance_may_differ():
    from pyro_lottery.handlers.local_reparameterization import perturb

    for mean, variance in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        out = perturb(torch.zeros(100_000, dtype=mean), torch.full((100_000,), 4.0, dtype=variance))
        assert out.dtype == mean
        assert abs(out.float().std() - 2) < 0.03


def linear(x, w, b):
    return nn.functional.linear(x, w, b)


class OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return nn.functional.linear(x, w, b)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x, grad.sum(0)


class Through(nn.Linear):
    """A linear layer that hands its weights to some function."""

    def __init__(self, function):
        super().__init__(6, 5)
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def out_of_sight(kind):
    example = torch.randn(2, 6), torch.randn(5, 6), torch.randn(5)
    return {
        "script": lambda: torch.jit.script(linear),
        "trace": lambda: torch.jit.trace(linear, example),
        "autograd function": lambda: OwnGradient.apply,
        "compile": lambda: torch.compile(linear, backend="aot_eager"),
    }[kind]()


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The .grad attribute", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "trace", "autograd function", "compile"])
def test_code_that_no_handler_sees_into_gets_weight_samples_and_their_gradients(kind):
    model, guide = built(Through(out_of_sight(kind)))
    x, draws = torch.randn(3, 6), 600
    found, grads = [], []
    for _ in range(draws):
        found.append(noisy(model, guide, x))
        grads.append(torch.autograd.grad(found[-1].square().sum(), guide.log_scale)[0])
    posterior = pl.posterior(guide)
    std = (x.square() @ posterior.scale["weight"].square().T + posterior.scale["bias"].square()).sqrt()
    found = torch.stack(found).detach()
    assert ((found.std(0) - std).abs() <= 4.5 * std * (1 / draws) ** 0.5).all()
    # y² = mean² + variance in expectation, and the variance's derivative by log_scale is 2·x²·scale²
    grads = torch.stack(grads)
    expected = 2 * x.square().sum(0) * posterior.scale["weight"].square()
    error = guide.unpack(grads.mean(0))["weight"] - expected
    assert (error.abs() <= 4.5 * guide.unpack(grads.std(0))["weight"] / draws**0.5).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_part_is_compiled_once():
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph

    model, guide = built(Through(torch.compile(linear, backend=backend)))
    elbo, x, y = pl.ELBO(estimator="local"), torch.randn(3, 6), torch.randn(3, 5)
    elbo.terms(model, guide, x, y)
    first = len(compiled)
    for _ in range(3):
        elbo.terms(model, guide, x, y)
    assert len(compiled) == first


def test_a_weight_without_closed_form_kl_is_the_sample_that_its_kl_is_of():
    guide = built(nn.Linear(6, 5))[1]
    with local_reparameterization():
        trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    posterior = pl.posterior(guide)
    for site, value in posterior.loc.items():
        drawn = trace.nodes[site]["value"]
        q = torch.distributions.Normal(value, posterior.scale[site])
        assert not torch.equal(drawn, value)
        torch.testing.assert_close(trace.nodes[site]["log_prob_sum"], q.log_prob(drawn).sum())
