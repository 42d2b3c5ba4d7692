"""``pl.ELBO`` on Pyro's own kinds of models: value and gradient agree in expectation with ``Trace_ELBO``."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormal
from torch.distributions import constraints

import pyro_lottery as pl
from tests.support import TinyNet


def param(name, value, constraint=constraints.real):
    return pyro.param(name, torch.tensor(value), constraint=constraint)


def hierarchy():
    """A scale, and a mean under it: the prior of b depends on a. The guide draws both apart."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, a.abs() + 0.5))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.2))


def hierarchy_guide():
    pyro.sample("a", dist.Normal(param("la", 0.4), param("sa", 0.7, constraints.positive)))
    pyro.sample("b", dist.Normal(param("lb", 0.3), param("sb", 0.9, constraints.positive)))


def chain_guide():
    """A guide that depends on another latent site, of a model whose priors do not."""
    a = pyro.sample("a", dist.Normal(param("la", 0.4), param("sa", 0.7, constraints.positive)))
    pyro.sample("b", dist.Normal(param("k", 0.8) * a, param("sb", 0.9, constraints.positive)))


def apart():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.5, 2.0))
    pyro.sample("y", dist.Normal(a * b, 1.0), obs=torch.tensor(1.2))


def coin():
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=torch.tensor(1.5))


def coin_guide():
    pyro.sample("z", dist.Bernoulli(param("p", 0.85, constraints.unit_interval)))


def without_rsample():
    pyro.sample("a", dist.Normal(param("la", 0.4), param("sa", 0.7, constraints.positive)).has_rsample_(False))
    pyro.sample("b", NonreparameterizedNormal(param("lb", 0.3), param("sb", 0.9, constraints.positive)))


def with_factor():
    apart()
    pyro.factor("more", -0.5 * param("theta", 0.7) ** 2)


def factor_guide():
    hierarchy_guide()
    pyro.factor("less", 0.3 * param("lb", 0.3) ** 2, has_rsample=True)


DATA = torch.tensor([0.3, -0.2, 1.1, 0.8, 2.0, -1.0])


def plates():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 0.8), obs=DATA.view(3, 2))


def plates_guide():
    pyro.sample("a", dist.Normal(param("la", 0.4), param("sa", 0.7, constraints.positive)))
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
        pyro.sample("b", dist.Normal(param("lb", 0.3), param("sb", 0.9, constraints.positive)))


def subsampled():
    with pyro.plate("data", 6, 2) as index:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(b, 0.8), obs=DATA[index])


def subsampled_guide():
    with pyro.plate("data", 6, 2):
        pyro.sample("b", dist.Normal(param("lb", 0.3), param("sb", 0.9, constraints.positive)))


def scaled_model():
    with poutine.scale(scale=0.4):
        apart()


def masked_pair(model):
    def run():
        with poutine.mask(mask=torch.tensor(False)):
            a = pyro.sample("c", dist.Normal(0.0, 1.0)) if model else None
            a = a if model else pyro.sample("c", dist.Normal(param("lc", 1.0), 1.0))
        apart() if model else hierarchy_guide()

    return run


PAIRS = {
    "hierarchy": (hierarchy, hierarchy_guide),
    "a guide that is a chain": (apart, chain_guide),
    "a hierarchy and a chain": (hierarchy, chain_guide),
    "all apart": (apart, hierarchy_guide),
    "a discrete site": (coin, coin_guide),
    "no reparameterised sample": (apart, without_rsample),
    "no reparameterised sample, a hierarchy": (hierarchy, without_rsample),
    "factors": (with_factor, factor_guide),
    "nested plates": (plates, plates_guide),
    "a subsampled plate": (subsampled, subsampled_guide),
    "scaled apart": (scaled_model, hierarchy_guide),
    "masked": (masked_pair(True), masked_pair(False)),
}


def moments(elbo, model, guide, repeats):
    """Mean and standard error of value and gradients, each parameter's in the order of names."""
    rows = []
    for _ in range(repeats):
        with poutine.trace(param_only=True) as seen:
            value = elbo.loss_and_grads(model, guide)
        nodes = {name: seen.trace.nodes[name]["value"].unconstrained() for name in sorted(seen.trace.nodes)}
        rows.append(torch.stack([torch.tensor(value), *(p.grad.detach().clone() for p in nodes.values())]))
        for p in nodes.values():
            p.grad = None
    rows = torch.stack(rows)
    return rows.mean(0), rows.std(0) / repeats**0.5


def agrees_with_pyro(model, guide, repeats, **options):
    """Assert that value and gradients agree with ``Trace_ELBO`` within 4.5 standard errors; returns those of Pyro."""
    ours, error = moments(pl.ELBO(**options), model, guide, repeats)
    stock, stock_error = moments(Trace_ELBO(**options), model, guide, repeats)
    pyro.clear_param_store()
    assert len(ours) == len(stock)
    assert ((ours - stock).abs() <= 4.5 * (error.square() + stock_error.square()).sqrt() + 1e-5).all(), (ours, stock)
    return stock


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("vectorized", [False, True])
def test_value_and_gradients_agree_with_pyro(name, vectorized):
    options = {"num_particles": 20, "vectorize_particles": vectorized, "max_plate_nesting": 2}
    stock = agrees_with_pyro(*PAIRS[name], 80 if vectorized else 8, **options)
    if name == "a discrete site":
        assert stock[1].abs() > 0.05  # what a pathwise gradient alone would miss


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def in_place(x):
    out = torch.zeros(2)
    out[1] = 2 * x
    return out.sum()


WAYS = {
    "a branch": lambda x: torch.tensor(1.0 if x > 0 else -1.0),
    "item": lambda x: torch.tensor(x.item()),
    "numpy": lambda x: torch.tensor(float(x.detach().numpy())),
    "a list": lambda x: torch.tensor([x.detach(), 1.0]).sum(),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "in place": in_place,
    "an autograd function": Square.apply,
    "plainly": torch.sin,
}


@pytest.mark.parametrize("guide_too", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_however_a_value_passes_to_another_sites_distribution(way, guide_too):
    # The guide draws b first and a from it, the model a first and b from it: neither has a closed form.
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(WAYS[way](a), 1.0))

    def guide():
        b = pyro.sample("b", dist.Normal(param("lb", 0.2), param("sb", 1.0, constraints.positive)))
        center = WAYS[way](b) if guide_too else param("k", 1.0) * b
        pyro.sample("a", dist.Normal(center + param("la", 0.1), 0.5))

    agrees_with_pyro(model, guide, 30, num_particles=10)


def folded(loc, scale):
    return dist.FoldedDistribution(dist.Normal(loc, scale))


def moved(base, loc):
    return dist.TransformedDistribution(dist.Normal(base, 1.0), [dist.transforms.AffineTransform(loc, 1.0)])


def masked(loc, *mask):
    return dist.Normal(loc, 1.0).expand([3]).mask(torch.tensor(mask)).to_event(1)


NOT_WHAT_TORCH_TAKES = {
    "folded": (lambda: folded(-1.0, 1.0), lambda: folded(param("l", 1.0), 0.7)),
    "a learned transformation": (lambda: moved(0.0, torch.tensor(0.0)), lambda: moved(1.0, param("l", 0.0))),
    "other masks": (lambda: masked(1.0, True, False, True), lambda: masked(param("l", 0.5), True, True, False)),
}


@pytest.mark.parametrize("name", NOT_WHAT_TORCH_TAKES)
def test_where_kl_divergence_is_not_the_expectation_it_is_sampled(name):
    prior, posterior = NOT_WHAT_TORCH_TAKES[name]
    model, guide = (lambda: pyro.sample("a", prior())), (lambda: pyro.sample("a", posterior()))
    agrees_with_pyro(model, guide, 30, num_particles=200, vectorize_particles=True, max_plate_nesting=0)


def test_closed_forms_of_masked_and_positive_sites_stay():
    mask = torch.tensor([True, False, True])

    def model(loc=0.0, scale=1.0):
        pyro.sample("a", dist.Normal(loc, scale).expand([3]).mask(mask).to_event(1))
        pyro.sample("b", dist.LogNormal(loc, scale))
        pyro.sample("c", dist.HalfNormal(scale))

    kl = [pl.ELBO().loss(model, lambda: model(0.4, 0.6)) for _ in range(2)]
    normal = torch.distributions.kl_divergence(dist.Normal(0.4, 0.6), dist.Normal(0.0, 1.0))
    half = torch.distributions.kl_divergence(dist.HalfNormal(0.6), dist.HalfNormal(1.0))
    assert kl == pytest.approx([(3 * normal + half).item()] * 2, rel=1e-5)


def test_a_hierarchys_value_is_known():
    # E_q of log p(a) + log N(b; a, 1) − log q: with b's prior at a, the KL of b is averaged over a.
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide():
        pyro.sample("a", dist.Normal(0.5, 0.8))
        pyro.sample("b", dist.Normal(-0.2, 0.6))

    a, b = (0.5, 0.8), (-0.2, 0.6)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(*a), torch.distributions.Normal(0.0, 1.0))
    # KL(b ‖ N(a, 1)) = −log s − 1/2 + (s² + (m − a)²)/2, and E (m − a)² = (m − 0.5)² + 0.8²
    expected = kl - torch.tensor(b[1]).log() - 0.5 + (b[1] ** 2 + (b[0] - a[0]) ** 2 + a[1] ** 2) / 2
    found = torch.tensor([pl.ELBO(num_particles=500, vectorize_particles=True).loss(model, guide) for _ in range(20)])
    assert abs(found.mean() - expected) < 4.5 * found.std() / 20**0.5


def test_closed_forms_are_taken_where_nothing_depends_on_them():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def guide():
        pyro.sample("a", dist.Normal(torch.ones(3), 0.5).to_event(1))

    q, p = torch.distributions.Normal(torch.ones(3), 0.5), torch.distributions.Normal(0.0, 1.0)
    exact = torch.distributions.kl_divergence(q, p).sum().item()
    assert pl.ELBO().loss(model, guide) == pytest.approx(exact, rel=1e-6)
    assert pl.ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0).loss(model, guide) == pytest.approx(
        exact, rel=1e-6
    )
    assert pl.ELBO("monte_carlo").loss(model, guide) != pytest.approx(exact, rel=1e-3)


def test_losses_from_several_threads_are_those_of_one():
    def pair(observed):
        def model():
            pyro.sample("y", dist.Normal(pyro.sample("a", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(observed))

        return model, lambda: pyro.sample("a", dist.Delta(torch.tensor(0.5)))

    pairs = [pair(float(observed)) for observed in range(4)]
    elbo, interval = pl.ELBO(), sys.getswitchinterval()
    expected = [[elbo.loss(*pair)] * 20 for pair in pairs]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda pair: [elbo.loss(*pair) for _ in range(20)], pairs))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected


def test_shapes_that_disagree_and_sites_that_one_lacks_are_refused():
    def site(name, shape=()):
        return lambda: pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))

    with pytest.raises(ValueError, match=r"event_dims disagree|shapes disagree"):
        pl.ELBO().loss(site("a", (3,)), site("a", (2,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(pl.UserError, match="does not sample site 'a'"):
            pl.ELBO().loss(site("a"), site("b"))
        with pytest.raises(pl.UserError, match="samples site 'b', which the model does not"):
            pl.ELBO().loss(lambda: None, site("b"))


def test_terms_refuses_what_it_cannot_differentiate():
    with pytest.raises(pl.UserError, match="'z' has no reparameterised sample"):
        pl.ELBO().terms(coin, coin_guide)
    pyro.clear_param_store()


def test_a_network_and_a_guide_of_pyro_without_its_temperature_are_refused_by_the_loss_too():
    model = pl.BayesianClassifier(TinyNet(), num_data=4, kl_temperature=0.1)
    guide = AutoNormal(model)
    with pytest.raises(pl.UserError, match=r"scaled by 0\.1 but the guide by 1\.0"):
        pl.ELBO().loss(model, guide, torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    pyro.clear_param_store()


def walk():
    """Two steps of a random walk, and an observation of the second."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(3.0))


def test_a_messenger_guide_and_other_estimators_serve_a_hierarchy():
    guide = AutoHierarchicalNormalMessenger(walk)
    guide()
    ours = torch.tensor([pl.ELBO().loss(walk, guide) for _ in range(300)])
    stock = torch.tensor([Trace_ELBO().loss(walk, guide) for _ in range(300)])
    assert abs(ours.mean() - stock.mean()) < 4.5 * ((ours.var() + stock.var()) / 300).sqrt()
    mean_field = pl.guides.mean_field(walk)
    for loss in (TraceGraph_ELBO(), Trace_ELBO(), pl.ELBO()):
        SVI(walk, mean_field, pyro.optim.Adam({"lr": 0.01}), loss).step()
    pyro.clear_param_store()


@pytest.mark.slow
def test_a_mean_field_guide_of_a_hierarchy_meets_the_best_mean_field_posterior():
    # Precision matrix [[2, −1], [−1, 2]] of (a, b): the best mean field has the exact means 1 and 2, and scales 1/√2.
    guide = pl.guides.mean_field(walk, init_scale=0.5)
    optimizer = torch.optim.Adam(guide.parameters(), 0.05)
    elbo = pl.ELBO(num_particles=8)(walk, guide)
    mean = dict.fromkeys(guide.state_dict(), torch.tensor(0.0))
    for step in range(300):
        optimizer.zero_grad()
        elbo().backward()
        optimizer.step()
        if step >= 150:
            mean = {name: mean[name] + value / 150 for name, value in guide.state_dict().items()}
    guide.load_state_dict(mean)
    posterior = pl.posterior(guide)
    assert [posterior.loc[s].item() for s in "ab"] == pytest.approx([1.0, 2.0], abs=0.06)
    assert [posterior.scale[s].item() for s in "ab"] == pytest.approx([0.5**0.5] * 2, rel=0.05)
