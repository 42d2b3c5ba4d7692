from contextlib import ExitStack, nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import nn
from torch.distributions import kl_divergence

import pyro_lottery as pl
from pyro_lottery.distributions import Pruned
from pyro_lottery.guides.family import family
from pyro_lottery.handlers import are_as_drawn
from pyro_lottery.kernels.kept import kept_of

GUIDES = {
    "mean_field": pl.guides.mean_field,
    "deterministic": pl.guides.deterministic,
    **{
        kind.__name__: lambda model, kind=kind: pl.guides.auto(kind, model)
        for kind in (AutoNormal, AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal)
    },
}


@pytest.mark.parametrize("name", GUIDES)
def test_pruned_weights_are_exactly_zero_in_every_sample(name, tiny_model, tiny_data, half_mask):
    guide = GUIDES[name](tiny_model)
    with pl.handlers.sparsify(half_mask):
        for _ in range(5):
            trace = poutine.trace(guide).get_trace()
            for site, mask in half_mask.items():
                value = trace.nodes[site]["value"]
                assert (value[~mask] == 0).all()
                assert (value[mask] != 0).all()
            replayed = poutine.trace(poutine.replay(tiny_model, trace)).get_trace(tiny_data.test[:4])
            assert all((replayed.nodes[s]["value"][~m] == 0).all() for s, m in half_mask.items())


def test_prior_samples_are_pruned_too(tiny_model, half_mask):
    with pl.handlers.sparsify(half_mask):
        trace = poutine.trace(tiny_model).get_trace()
    assert all((trace.nodes[s]["value"][~m] == 0).all() for s, m in half_mask.items())
    assert trace.nodes["conv.weight"]["value"][half_mask["conv.weight"]].std() > 0.3  # the prior's scale is 1


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_pruned_weights_add_exactly_nothing_to_the_kl(name, kl, tiny_model, tiny_data, half_mask):
    # The KL must not notice what the loc and scale of a pruned weight are.
    guide = GUIDES[name](tiny_model)
    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]

    def value():
        torch.manual_seed(3)
        with pl.handlers.sparsify(half_mask):
            return pl.ELBO(kl).terms(tiny_model, guide, x, y).tempered_kl.item()

    before = value()
    with torch.no_grad():
        for site, loc in family(guide).locs().items():
            if site in half_mask:
                loc[~half_mask[site]] = 1e3
    assert value() == before


@pytest.mark.parametrize("name", GUIDES)
def test_pruned_weights_get_no_gradient(name, tiny_model, tiny_data, half_mask):
    guide = GUIDES[name](tiny_model)
    with pl.handlers.sparsify(half_mask):
        terms = pl.ELBO().terms(tiny_model, guide, tiny_data.test[:4], tiny_data.test.labels[:4])
    (terms.nll + terms.tempered_kl).backward()
    gradients = {id(p): p.grad for p in guide.parameters()}
    if name in ("mean_field", "deterministic"):
        for parameter in guide.parameters():
            by_site = guide.unpack(parameter.grad)
            assert all((by_site[s][~m] == 0).all() for s, m in half_mask.items())
    assert all(g is None or g.isfinite().all() for g in gradients.values())


def test_masked_kl_is_the_sum_of_torch_kls_over_survivors(tiny_model, tiny_data, half_mask):
    guide = pl.guides.mean_field(tiny_model, init_scale=0.3)
    posterior = pl.posterior(guide)
    expected = torch.tensor(0.0, dtype=torch.double)
    for site, loc in posterior.loc.items():
        q = torch.distributions.Normal(loc.double(), posterior.scale[site].double())
        kl = kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        expected += kl[half_mask[site]].sum() if site in half_mask else kl.sum()
    with pl.handlers.sparsify(half_mask):
        kl = pl.ELBO().terms(tiny_model, guide, tiny_data.test[:4], tiny_data.test.labels[:4]).tempered_kl
    assert kl.item() == pytest.approx(0.1 * expected.item(), rel=1e-5)


def test_stock_trace_elbo_agrees_under_a_mask(tiny_model, tiny_data, half_mask):
    # The same samples give Trace_ELBO the same number as our Monte Carlo estimate: the handler is not ours alone.
    guide = pl.guides.mean_field(tiny_model)
    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]
    with pl.handlers.sparsify(half_mask):
        torch.manual_seed(5)
        ours = pl.ELBO("monte_carlo").loss(tiny_model, guide, x, y)
        torch.manual_seed(5)
        stock = Trace_ELBO().loss(tiny_model, guide, x, y)
    assert ours == pytest.approx(stock, rel=1e-5)


def test_a_guide_that_cannot_be_masked_says_so(tiny_model, half_mask):
    stock = AutoMultivariateNormal(tiny_model)
    with pytest.raises(pl.UserError, match=r"guides\.auto"), pl.handlers.sparsify(half_mask):
        stock()
    pyro.clear_param_store()  # which a guide of Pyro's own keeps its parameters in
    flow = pl.guides.auto(AutoIAFNormal, tiny_model)
    assert flow()["conv.weight"].shape == (4, 1, 3, 3)
    with pytest.raises(pl.UserError, match="no closed-form marginal"), pl.handlers.sparsify(half_mask):
        flow()


def test_wrong_masks_are_named(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    misspelt = pl.handlers.sparsify({"conv.weigth": torch.ones(4, 1, 3, 3)})
    with pytest.raises(pl.UserError, match=r"conv\.weigth.*did you mean 'conv\.weight'"), misspelt:
        guide()
    mis_shaped = pl.handlers.sparsify({"conv.weight": torch.ones(2)})
    with pytest.raises(pl.UserError, match=r"\(2,\).*\(4, 1, 3, 3\)"), mis_shaped:
        guide()


def test_sparsify_decorates_a_callable(tiny_model, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    pruned = pl.handlers.sparsify(half_mask)(guide)
    assert (pruned()["hidden.weight"][~half_mask["hidden.weight"]] == 0).all()
    assert (guide()["hidden.weight"] != 0).all()
    assert not pyro.poutine.runtime._PYRO_STACK


def test_nested_masks_keep_what_all_keep_and_stay_the_same_object(tiny_model, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    other = {"conv.weight": torch.rand(4, 1, 3, 3) < 0.5}
    with pl.handlers.sparsify(half_mask), pl.handlers.sparsify(other):
        shape = torch.Size((4, 1, 3, 3))
        joined = pl.handlers.active_mask("conv.weight", shape)
        assert joined is pl.handlers.active_mask("conv.weight", shape)
        assert torch.equal(joined, half_mask["conv.weight"] & other["conv.weight"])
        with pl.guides.compressed(guide):
            assert torch.equal(guide()["conv.weight"] != 0, joined)


def test_a_mask_changed_in_place_counts_at_the_next_use(tiny_model, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    with pl.handlers.sparsify(half_mask):
        guide()
        half_mask["hidden.weight"].zero_()
        assert guide()["hidden.weight"].any()
    with pl.handlers.sparsify(half_mask):
        assert not guide()["hidden.weight"].any()


def test_a_mask_around_the_prior_alone_counts_in_the_kl(tiny_model, half_mask, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]
    with pl.handlers.sparsify(half_mask):
        both = pl.ELBO().terms(tiny_model, guide, x, y).tempered_kl
    one = pl.ELBO().terms(pl.handlers.sparsify(half_mask)(tiny_model), guide, x, y).tempered_kl
    torch.testing.assert_close(one, both)


def test_a_guide_whose_draws_cannot_be_masked_is_refused(tiny_model, half_mask):
    guide = pl.guides.auto(AutoStructured, tiny_model)
    guide()
    with (
        pytest.raises(pl.UserError, match=r"the guide draws all weights from .*, which cannot be masked"),
        pl.handlers.sparsify(half_mask),
    ):
        guide()


def regression(scale=0.5):
    """y = 2·x₁ + 3·x₂ + noise with x₁ and x₂ correlated, so that pruning x₂ moves the first weight; exact posteriors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator)
    x[:, 1] += x[:, 0]
    y = x @ torch.tensor([[2.0], [3.0], [-1.0]]) + scale * torch.randn(30, 1, generator=generator)
    net = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False))
    model = pl.BayesianRegressor(net, num_data=30, noise_scale=scale)

    def exact(kept):
        a = x[:, kept]
        covariance = torch.linalg.inv(a.mT @ a / scale**2 + torch.eye(a.shape[1]))
        return (covariance @ a.mT @ y / scale**2).squeeze(1), covariance.diagonal().sqrt()

    return model, x, y, exact


@pytest.mark.slow
@pytest.mark.parametrize("decorated", [False, True])
def test_nuts_under_a_mask_meets_the_exact_posterior_of_the_survivors(decorated):
    model, x, y, exact = regression()
    mask = {"0.weight": torch.tensor([[True, False, True]])}
    loc, scale = exact([0, 2])
    pyro.set_rng_seed(0)
    with nullcontext() if decorated else pl.handlers.sparsify(mask):
        kernel = NUTS(pl.handlers.sparsify(mask)(model) if decorated else model)
        chain = MCMC(kernel, num_samples=400, warmup_steps=100, disable_progbar=True)
        chain.run(x, y)
    samples = chain.get_samples()["0.weight"][:, 0]
    assert torch.equal(samples[:, 1], torch.zeros(400))
    torch.testing.assert_close(samples[:, [0, 2]].mean(0), loc, rtol=0.02, atol=0)
    torch.testing.assert_close(samples[:, [0, 2]].std(0), scale, rtol=0.15, atol=0)


@pytest.mark.parametrize("name", GUIDES)
def test_importance_weights_under_a_mask_are_those_of_the_masked_model_and_guide(
    name, tiny_model, half_mask, tiny_data
):
    guide, prune = GUIDES[name](tiny_model), pl.handlers.sparsify(half_mask)
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    tiny_model.eval()
    pyro.set_rng_seed(0)
    expected = Importance(prune(tiny_model), prune(guide), num_samples=3).run(*args)
    pyro.set_rng_seed(0)
    with prune:
        found = Importance(tiny_model, guide, num_samples=3).run(*args)
    assert torch.equal(torch.stack(found.log_weights), torch.stack(expected.log_weights))
    for trace in found.exec_traces:
        assert all((trace.nodes[s]["value"][~m] == 0).all() for s, m in half_mask.items())


@pytest.mark.parametrize("inside", [True, False])
def test_values_that_somebody_else_sets_are_pruned(inside, tiny_model, half_mask, tiny_data):
    dense = tiny_model.initial_values()
    sparse = {n: torch.where(half_mask[n], v, 0.0) if n in half_mask else v for n, v in dense.items()}
    x = tiny_data.test[:4]
    tiny_model.eval()
    expected = poutine.condition(tiny_model, sparse)(x)
    prune = pl.handlers.sparsify(half_mask)
    pruned = prune(poutine.condition(tiny_model, dense)) if inside else poutine.condition(prune(tiny_model), dense)
    assert torch.equal(pruned(x), expected)
    trace = poutine.trace(pruned).get_trace(x)
    trace.compute_log_prob()
    for name, m in half_mask.items():
        log_prob = dist.Normal(0.0, 1.0).log_prob(dense[name])[m].sum()
        assert trace.nodes[name]["log_prob_sum"].item() == pytest.approx(0.1 * log_prob.item(), rel=1e-5)
    guide_trace = poutine.trace(pl.guides.mean_field(tiny_model)).get_trace()  # that knows nothing of the mask
    assert (guide_trace.nodes["hidden.weight"]["value"] != 0).all()
    replayed = (
        prune(poutine.replay(tiny_model, guide_trace)) if inside else poutine.replay(prune(tiny_model), guide_trace)
    )
    with poutine.trace() as seen:
        seen_output = replayed(x)
    values = {n: guide_trace.nodes[n]["value"] * half_mask.get(n, torch.tensor(True)) for n in dense}
    assert torch.equal(seen_output, poutine.condition(tiny_model, values)(x))
    assert seen is not None


def test_a_prediction_takes_the_draws_of_a_guide_under_its_mask_as_they_are(tiny_model, half_mask, tiny_data):
    """So that layers find the kept weights, and none is pruned twice."""
    guide, met = pl.guides.mean_field(tiny_model), []
    with pl.handlers.sparsify(half_mask):
        pl.predict(tiny_model, guide, tiny_data.test[:4])  # the first one checks a copy of the network
        hook = tiny_model.net.hidden.register_forward_pre_hook(lambda layer, x: met.append(kept_of(layer.weight)))
        pl.predict(tiny_model, guide, tiny_data.test[:4], num_samples=2)
    hook.remove()
    assert len(met) == 2
    assert all(kept is not None and kept._values is not None for kept in met)


def _by_data(value):
    value.data.add_(1.0)


def _by_numpy(value):
    value.numpy()[:] += 1.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [lambda value: value.add_(1.0), _by_data, _by_numpy])
def test_draws_that_somebody_changed_are_pruned_again(mode, change, tiny_model, half_mask, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    with pl.handlers.sparsify(half_mask), mode():
        guide_trace = poutine.trace(guide).get_trace()
        drawn = {name: guide_trace.nodes[name]["value"] for name in half_mask}
        for value in drawn.values():
            change(value)
        trace = poutine.trace(poutine.condition(tiny_model, drawn)).get_trace(tiny_data.test[:4])
    for name, mask in half_mask.items():
        assert (trace.nodes[name]["value"][~mask] == 0).all()
        assert torch.equal(trace.nodes[name]["value"][mask], drawn[name][mask])


def test_two_nested_masks_keep_the_closed_form(tiny_model, half_mask, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    other = {"conv.weight": torch.rand(4, 1, 3, 3) < 0.5, "out.bias": torch.tensor([True, False, True])}
    both = half_mask | other | {"conv.weight": half_mask["conv.weight"] & other["conv.weight"]}
    args = tiny_data.test[:4], tiny_data.test.labels[:4]

    def terms(*masks):
        torch.manual_seed(0)
        tiny_model.eval()
        with ExitStack() as stack:
            for mask in masks:
                stack.enter_context(pl.handlers.sparsify(mask))
            return pl.ELBO().terms(tiny_model, guide, *args)

    for masks in ((half_mask, other), (other, half_mask), (half_mask, half_mask, other)):
        assert terms(*masks).tempered_kl.item() == terms(both).tempered_kl.item()
        assert terms(*masks).nll.item() == terms(both).nll.item()


@pytest.mark.parametrize("name", [*GUIDES, "flow", "structured"])
def test_an_empty_mask_changes_nothing(name, tiny_model, tiny_data):
    more = {"flow": AutoIAFNormal, "structured": AutoStructured}
    guide = pl.guides.auto(more[name], tiny_model) if name in more else GUIDES[name](tiny_model)
    guide()
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    values = []
    for handler in (nullcontext(), pl.handlers.sparsify({})):
        torch.manual_seed(0)
        tiny_model.eval()
        with handler:
            values.append(pl.ELBO().loss(tiny_model, guide, *args))
    assert values[0] == values[1]


def test_a_guide_built_under_a_mask_is_dense_outside(tiny_model, half_mask):
    for kind in (AutoNormal, AutoDiagonalNormal):
        with pl.handlers.sparsify(half_mask):
            guide = pl.guides.auto(kind, tiny_model)
            assert (guide()["hidden.weight"][~half_mask["hidden.weight"]] == 0).all()
        assert (guide()["hidden.weight"] != 0).all()


def test_a_pruned_distribution_has_mean_and_variance_0_where_it_prunes():
    mask = torch.tensor([True, False])
    pruned = Pruned(dist.Normal(torch.tensor([2.0, 3.0]), 0.5), mask)
    assert pruned.mean.tolist() == [2.0, 0.0]
    assert pruned.variance.tolist() == [0.25, 0.0]
    assert pruned.support.check(torch.tensor([1.0, 0.0])).all()
    assert pruned.support.check(torch.tensor([1.0, 1.0])).tolist() == [True, False]
    transform = torch.distributions.biject_to(pruned.support)
    numbers = torch.tensor([0.3, 0.4])
    assert transform(numbers).tolist() == pytest.approx([0.3, 0.0])
    assert transform.inv(transform(numbers)).tolist() == pytest.approx([0.3, 0.0])
    assert transform.log_abs_det_jacobian(numbers, transform(numbers)).tolist() == pytest.approx([0.0, -0.08])


def test_pyros_predictive_under_a_mask_is_that_of_pruned_weights(tiny_model, half_mask, tiny_data):
    guide, x = pl.guides.mean_field(tiny_model), tiny_data.test[:4]
    tiny_model.eval()
    with pl.handlers.sparsify(half_mask):
        found = Predictive(tiny_model, guide=guide, num_samples=3, return_sites=("_RETURN", *tiny_model.sites))(x)
    for draw in range(3):
        weights = {site: found[site][draw].view(v.shape) for site, v in tiny_model.initial_values().items()}
        assert all(
            (weights[site][~mask] == 0).all() and (weights[site][mask] != 0).all() for site, mask in half_mask.items()
        )
        assert torch.equal(poutine.condition(tiny_model, weights)(x), found["_RETURN"][draw].view(4, 3))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RenyiELBO, pl.ELBO])
def test_pyros_losses_leave_pruned_weights_alone_and_train_the_others(loss, tiny_model, half_mask, tiny_data):
    guide, args = pl.guides.mean_field(tiny_model), (tiny_data.test[:4], tiny_data.test.labels[:4])
    before = {site: loc.clone() for site, loc in pl.posterior(guide).loc.items()}
    svi = SVI(tiny_model, guide, pyro.optim.Adam({"lr": 0.01}), loss(num_particles=2))
    with pl.handlers.sparsify(half_mask):
        svi.step(*args)
    for site, after in pl.posterior(guide).loc.items():
        mask = half_mask.get(site, torch.ones_like(after, dtype=torch.bool))
        assert torch.equal(after[~mask], before[site][~mask])
        assert (after[mask] != before[site][mask]).float().mean() > 0.5  # a dead unit gets the prior's gradient alone


def test_draws_of_a_guide_under_the_masks_are_known_to_be_what_the_network_uses(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    mask = {"conv.weight": torch.rand(tiny_model.initial_values()["conv.weight"].shape) < 0.5}
    with torch.no_grad():
        dense = guide()
        assert are_as_drawn(dense)
        with pl.handlers.sparsify(mask):
            assert not are_as_drawn(dense)
            drawn = guide()
            assert are_as_drawn(drawn)
            with poutine.condition(data={"out.bias": torch.zeros(3)}):
                assert not are_as_drawn(drawn)
            with pl.handlers.sparsify({"conv.weight": ~mask["conv.weight"]}):
                assert not are_as_drawn(drawn)
            drawn["conv.weight"].mul_(2)
            assert not are_as_drawn(drawn)
            assert are_as_drawn(pl.guides.auto(AutoNormal, tiny_model)())


@pytest.mark.parametrize("kind", ["mean_field", "AutoNormal"])
@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("around", [nullcontext, partial(poutine.scale, scale=1.0)], ids=["alone", "scale"])
def test_predictions_ask_pyro_for_a_draw_of_the_weights_at_most_once(tiny_model, kind, batch_size, around):
    guide = pl.guides.mean_field(tiny_model) if kind == "mean_field" else pl.guides.auto(AutoNormal, tiny_model)
    mask = {"conv.weight": torch.rand(tiny_model.initial_values()["conv.weight"].shape) < 0.5}
    x, met = torch.randn(5, 1, 4, 4), []
    with pl.handlers.sparsify(mask):
        torch.manual_seed(3)
        with around():
            probs = pl.predict(tiny_model, guide, x, 2, batch_size=batch_size)
        torch.manual_seed(3)
        tiny_model.eval()
        with torch.no_grad():
            draws = [dict(guide()) for _ in range(2)]
            each = [poutine.condition(tiny_model.outputs, data=draw)(x).softmax(-1) for draw in draws]
    torch.testing.assert_close(probs, torch.stack(each).mean(0))
    network = pl.BayesianNetwork.sampled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.BayesianNetwork, "sampled", lambda self: met.append(0) or network(self))
        with pl.handlers.sparsify(mask), around():
            pl.predict(tiny_model, guide, x, 2, batch_size=batch_size)
    assert len(met) == (2 if around is not nullcontext else 0)


@pytest.mark.parametrize("stock", [False, True])
def test_a_replay_from_outside_of_a_guide_under_another_mask_is_pruned(stock):
    model = pl.BayesianClassifier(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), num_data=10)
    guide, half, seen = pl.guides.mean_field(model), torch.tensor([[1, 1, 0, 0]] * 3).bool(), []
    model.net[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight != 0))
    of_model = pl.handlers.sparsify({"0.weight": ~half})(model)
    of_guide = pl.handlers.sparsify({"0.weight": half})(guide)
    x, y = torch.randn(5, 4), torch.zeros(5).long()
    (pyro.infer.Trace_ELBO() if stock else pl.ELBO()).loss(of_model, of_guide, x, y)
    assert seen
    assert not any(kept.any() for kept in seen), "the two masks have no weight in common"
