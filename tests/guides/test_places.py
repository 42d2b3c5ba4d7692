"""Our guides on any Pyro model: plates, subsamples and supports."""

from operator import attrgetter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer import autoguide as A
from pyro.infer.autoguide import AutoNormal

import pyro_lottery as pl
from tests.guides.models import loop, nested, subsampled, supports, vectorizable


@pytest.fixture
def pair():
    """A mean-field guide of a model at random parameters, and Pyro's AutoNormal with the same loc and scale."""

    def of(model):
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

    yield of
    pyro.clear_param_store()  # in which Pyro keeps what AutoNormal learns


@pytest.mark.parametrize("model", [nested, subsampled, supports])
def test_the_density_of_a_draw_is_autonormals(pair, model):
    ours, stock = pair(model)
    for _ in range(5):
        drawn = poutine.trace(stock).get_trace()
        again = poutine.trace(poutine.replay(ours, drawn)).get_trace()
        for name in ours.shapes:
            assert torch.equal(again.nodes[name]["value"], drawn.nodes[name]["value"])
        torch.testing.assert_close(again.log_prob_sum(), drawn.log_prob_sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", [nested, subsampled, supports])
def test_elbo_and_gradients_are_autonormals_in_expectation(pair, model):
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


def test_particles_may_be_vectorized(pair):
    ours, stock = pair(nested)
    losses = [
        Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=2).loss(vectorizable, guide)
        for guide in (ours, stock)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_sequential_plates_need_no_handling_unless_they_are_subsampled():
    assert set(pl.guides.mean_field(loop)()) == {"w0", "w1", "w2"}

    def some():
        for index in pyro.plate("steps", 3, subsample_size=2):
            pyro.sample(f"w{index}", dist.Normal(0.0, 1.0))

    with pytest.raises(pl.UserError, match=r"is in 'steps', a loop over a subsample"):
        pl.guides.mean_field(some)


def test_a_model_without_sites_is_refused():
    for make in (pl.guides.mean_field, lambda model: pl.guides.auto(AutoNormal, model)):
        with pytest.raises(pl.UserError, match="the model has no latent sites"):
            make(lambda: None)


def test_discrete_sites_are_refused_by_name():
    with pytest.raises(pl.UserError, match=r"site 'k' is over .*, to which no map from the real numbers is known"):
        pl.guides.mean_field(lambda: pyro.sample("k", dist.Categorical(torch.ones(3))))


def test_a_site_that_is_not_over_all_real_numbers_cannot_be_pruned():
    for make in (pl.guides.mean_field, pl.guides.deterministic):
        guide = make(supports)
        with (
            pytest.raises(pl.UserError, match="'a' is not over all real numbers, so it cannot be pruned"),
            pl.handlers.sparsify({"a": torch.tensor([True, False, True])}),
        ):
            guide()


def test_a_prior_over_less_than_the_real_line_is_refused(tiny_data):
    import pyro.distributions as dist

    from tests.support import TinyNet

    for prior in (dist.Uniform(-1.0, 1.0), dist.HalfNormal(1.0)):
        model = pl.BayesianClassifier(TinyNet(), prior, num_data=1)
        for make in (
            pl.guides.mean_field,
            lambda model: pl.guides.auto(A.AutoNormal, model),
            lambda model: pl.guides.auto(A.AutoDiagonalNormal, model),
        ):
            with pytest.raises(pl.UserError, match=r"prior of 'conv\.weight' is over .*, not all real numbers"):
                make(model)
