"""Our guides on any Pyro model: plates, subsamples, supports, medians and quantiles."""

import copy
from operator import attrgetter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_lottery as pl


@pytest.fixture(autouse=True)
def _stock_parameters():
    """Those of Pyro's own guides are in its global store."""
    yield
    pyro.clear_param_store()


def nested():
    """Plates within each other; the inner one has events of two numbers."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 4, dim=-2):
        a = pyro.sample("a", dist.Normal(w.sum(-1, keepdim=True), 1.0))
        with pyro.plate("columns", 5, dim=-1):
            b = pyro.sample("b", dist.Normal(a.unsqueeze(-1) + torch.zeros(5, 2), 2.0).to_event(1))
            pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=torch.ones(4, 5))


def subsampled():
    """A plate of 8 of which 3 are seen at a time, with a positive number and a pair of numbers for each."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 8, subsample_size=3) as index:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(m, 1.0).expand([3, 2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1 + s), obs=torch.arange(8.0)[index])


def supports():
    """Positive numbers, a simplex, an interval and the factor of a correlation matrix."""
    a = pyro.sample("a", dist.Gamma(torch.ones(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.Dirichlet(torch.ones(4)))
    c = pyro.sample("c", dist.Uniform(-1.0, 2.0))
    d = pyro.sample("d", dist.LKJCholesky(3, torch.tensor(1.0)))
    pyro.sample("y", dist.Normal(a.sum() + b[0] + c + d.sum(), 1.0), obs=torch.tensor(1.0))


def loop():
    """A sequential plate."""
    for index in pyro.plate("steps", 3):
        pyro.sample(f"w{index}", dist.Normal(0.0, 1.0))


def pair(model):
    """A mean-field guide at random parameters, and Pyro's AutoNormal with the same loc and scale."""
    ours, stock = pl.guides.mean_field(model), AutoNormal(model)
    with torch.no_grad():
        ours.loc.normal_()
        ours.log_scale.normal_(-0.5, 0.3)
        stock()
        for name, loc in ours.unpack(ours.loc).items():
            attrgetter(f"{name}_unconstrained")(stock.locs).copy_(loc)
        for name, log_scale in ours.unpack(ours.log_scale).items():  # AutoNormal's is softplus of its parameter
            attrgetter(f"{name}_unconstrained")(stock.scales).copy_(log_scale.exp().expm1().log())
    return ours, stock


@pytest.mark.parametrize("model", [nested, subsampled, supports])
def test_the_density_of_a_draw_is_autonormals(model):
    ours, stock = pair(model)
    for _ in range(5):
        drawn = poutine.trace(stock).get_trace()
        again = poutine.trace(poutine.replay(ours, drawn)).get_trace()
        for name in ours.shapes:
            assert torch.equal(again.nodes[name]["value"], drawn.nodes[name]["value"])
        torch.testing.assert_close(again.log_prob_sum(), drawn.log_prob_sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", [nested, subsampled, supports])
def test_elbo_and_gradients_are_autonormals_in_expectation(model):
    ours, stock = pair(model)
    found = []
    for elbo, guide in ((pl.ELBO(), ours), (Trace_ELBO(), stock)):
        locs = [guide.loc] if guide is ours else list(guide.locs.parameters())
        rows = []
        for _ in range(200):
            loss = elbo.differentiable_loss(model, guide)
            grads = torch.autograd.grad(loss, locs)
            rows.append(torch.cat([loss.detach().reshape(1), *(grad.reshape(-1) for grad in grads)]))
        found.append(torch.stack(rows))
    (a, b), count = found, 200
    error = ((a.var(0) + b.var(0)) / count).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * error + 1e-4).all()


def test_a_subsampled_plate_meets_the_exact_posterior():
    # z_i ~ N(0, 1) and x_i ~ N(z_i, 0.5²): the posterior of z_i is N(0.8·x_i, 0.2), whichever are seen at a time. Each is
    # there 100 times, so that their mean has little noise.
    x = torch.tensor([3.0, -2.0, 1.0, 0.5, -1.0, 2.0])

    def model():
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2, 100]).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[index, None].expand(2, 100))

    guide = pl.guides.mean_field(model, init_scale=0.2)
    optimizer, elbo = torch.optim.Adam(guide.parameters(), 0.03), pl.ELBO()
    average = {name: torch.zeros_like(value) for name, value in guide.state_dict().items()}
    for step in range(700):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide).backward()
        optimizer.step()
        if step >= 400:
            for name, value in guide.state_dict().items():
                average[name] += value / 300
    guide.load_state_dict(average)
    posterior = pl.posterior(guide)
    torch.testing.assert_close(posterior.loc["z"].mean(1), 0.8 * x, rtol=0, atol=0.02)
    torch.testing.assert_close(posterior.scale["z"].mean(1), torch.full((6,), 0.2**0.5), rtol=0.02, atol=0)


def test_plates_of_the_users_own_say_which_entries_are_drawn():
    def model(index):
        with pyro.plate("data", 6, subsample=index):
            pyro.sample("z", dist.Normal(torch.zeros(len(index)), 1.0))

    index = torch.tensor([5, 0, 3])
    guide = pl.guides.deterministic(model, index, create_plates=lambda index: pyro.plate("data", 6, subsample=index))
    assert guide.shapes["z"] == (6,)
    with torch.no_grad():
        guide.loc.copy_(torch.arange(6.0))
    assert guide(index)["z"].tolist() == [5, 0, 3]
    every = torch.tensor([5, 0, 3, 1, 2, 4])
    assert guide(every)["z"].tolist() == every.tolist()


def test_plates_of_the_users_own_are_made_though_no_site_is_in_them():
    # Both axes of the data are subsampled by the same indices, which the model cannot say itself.
    def model(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, dim=-2), pyro.plate("columns", 10, dim=-1):
            part = pyro.subsample(x, event_dim=0)
            assert not square or part.shape == (5, 5)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=part)

    def create_plates(x):
        rows = pyro.plate("rows", 10, subsample_size=5, dim=-2)
        with rows as index:
            return rows, pyro.plate("columns", 10, subsample=index, dim=-1)

    square, x = False, torch.randn(10, 10)
    guide = pl.guides.mean_field(model, 0.1, x, create_plates=create_plates)
    square = True
    trace = poutine.trace(guide).get_trace(x)
    assert torch.equal(trace.nodes["rows"]["value"], trace.nodes["columns"]["value"])
    poutine.replay(model, trace)(x)


def test_minibatches_may_differ_in_size():
    def model(index):
        with pyro.plate("data", 7, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(index)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(7.0)[index])

    guide = pl.guides.mean_field(
        model, 0.1, torch.arange(3), create_plates=lambda index: pyro.plate("data", 7, subsample=index)
    )
    for index in torch.arange(7).split(3):  # 3, 3 and 1
        guide.zero_grad()
        pl.ELBO().differentiable_loss(model, guide, index).backward()
        assert guide.loc.grad.nonzero().squeeze(1).tolist() == index.tolist() or 0 in index.tolist()


def test_a_model_without_sites_is_refused():
    for make in (pl.guides.mean_field, lambda model: pl.guides.auto(AutoNormal, model)):
        with pytest.raises(pl.UserError, match="the model samples no site"):
            make(lambda: None)


def test_a_mask_of_sites_in_a_plate():
    guide, mask = pl.guides.mean_field(nested), {"b": torch.arange(40).view(4, 5, 2) % 3 == 0}
    with pl.handlers.sparsify(mask):
        assert torch.equal(guide()["b"] != 0, mask["b"])
        assert torch.equal(guide.median()["b"] != 0, mask["b"] & (guide.unpack(guide.loc)["b"] != 0))
    assert pl.posterior(guide).prunable == ("a", "b")
    guide, mask = pl.guides.mean_field(subsampled), {"z": torch.arange(16).view(8, 2) % 3 == 0}
    assert pl.posterior(guide).prunable == ()
    with pytest.raises(pl.UserError, match="site 'z' is in a subsampled plate"), pl.handlers.sparsify(mask):
        guide()


def test_particles_may_be_vectorized():
    ours, stock = pair(nested)
    losses = [
        Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=2).loss(vectorizable, guide)
        for guide in (ours, stock)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def vectorizable():
    """The latent sites of ``nested``."""
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 4, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 5, dim=-1):
            b = pyro.sample("b", dist.Normal(a.unsqueeze(-1) + torch.zeros(5, 2), 2.0).to_event(1))
            pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=torch.ones(4, 5))


def test_sequential_plates_need_no_handling_unless_they_are_subsampled():
    assert set(pl.guides.mean_field(loop)()) == {"w0", "w1", "w2"}

    def some():
        for index in pyro.plate("steps", 3, subsample_size=2):
            pyro.sample(f"w{index}", dist.Normal(0.0, 1.0))

    with pytest.raises(pl.UserError, match=r"is in 'steps', a loop over a subsample"):
        pl.guides.mean_field(some)


def test_discrete_sites_are_refused_by_name():
    with pytest.raises(pl.UserError, match=r"site 'k' is over .*, which no map reaches from the real numbers"):
        pl.guides.mean_field(lambda: pyro.sample("k", dist.Categorical(torch.ones(3))))


def test_a_site_that_is_not_over_all_real_numbers_cannot_be_pruned():
    for make in (pl.guides.mean_field, pl.guides.deterministic):
        guide = make(supports)
        with (
            pytest.raises(pl.UserError, match="'a' is not over all real numbers, so its values cannot be pruned"),
            pl.handlers.sparsify({"a": torch.tensor([True, False, True])}),
        ):
            guide()


class Below(dist.TransformedDistribution):
    """2 − exp(N(0, 1)), whose support is below 2."""

    support = constraints.less_than(2.0)

    def __init__(self):
        super().__init__(
            dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(2.0, -1.0)]
        )


def test_medians_and_quantiles_are_those_of_draws():
    def model():
        supports()
        pyro.sample("e", Below())

    guide = pl.guides.mean_field(model, 0.5)
    with pyro.plate("draws", 4000, dim=-1):
        draws = guide()
    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    for name in ("a", "c", "e"):
        seen = draws[name].detach()
        shares = torch.stack([(seen < value).float().mean(0) for value in quantiles[name]])
        expected = torch.tensor([0.1, 0.5, 0.9]).view(-1, *[1] * (shares.dim() - 1)).expand_as(shares)
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.025)  # 4000 draws: 5 standard errors
        assert torch.equal(guide.median()[name], quantiles[name][1])
    assert quantiles["b"].shape == (3, 4)


def test_quantiles_equal_autonormals_and_obey_masks(tiny_model, half_mask):
    ours, stock = pl.guides.mean_field(tiny_model, 0.3), pl.guides.auto(AutoNormal, tiny_model, 0.3)
    for name, value in stock.quantiles([0.05, 0.5, 0.9]).items():
        torch.testing.assert_close(ours.quantiles([0.05, 0.5, 0.9])[name], value)
    assert all(torch.equal(ours.median()[name], loc) for name, loc in pl.posterior(ours).loc.items())
    before = ours.quantiles(torch.tensor([0.0, 0.3]))
    with pl.handlers.sparsify(half_mask):
        under = ours.quantiles(torch.tensor([0.0, 0.3]))
        with pl.guides.compressed(ours):
            inside = ours.quantiles([0.0, 0.3])
    for name, value in under.items():
        mask = half_mask.get(name, torch.ones(value.shape[1:], dtype=torch.bool))
        assert torch.equal(value, torch.where(mask, before[name], 0.0))
        assert torch.equal(value, inside[name])
    with pytest.raises(pl.UserError, match=r"quantiles are between 0 and 1, got \[2\.0\]"):
        ours.quantiles([2.0])


def test_every_quantile_of_a_point_is_its_value(tiny_model, half_mask):
    guide = pl.guides.deterministic(tiny_model)
    with pl.handlers.sparsify(half_mask):
        values = guide()
        for name, value in guide.quantiles([0.0, 0.5, 1.0]).items():
            assert torch.equal(value, values[name].expand_as(value))
            assert torch.equal(guide.median()[name], values[name])


def test_guides_with_plates_are_copied_and_compared():
    guide = pl.guides.mean_field(subsampled)
    again = copy.deepcopy(guide)
    again()
    pl.guides.check_sites(subsampled, again)
    with pytest.raises(pl.UserError, match=r"m is not in the model; s is not in the model"):
        pl.guides.check_sites(nested, guide)
