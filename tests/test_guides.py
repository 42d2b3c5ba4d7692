import copy
import pickle
from dataclasses import replace
from operator import attrgetter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import kl_divergence, transform_to

import pyro_lottery as pl
from pyro_lottery import guides
from pyro_lottery.guides.preimage import preimage
from pyro_lottery.types import Posterior


def test_starts_at_the_networks_values_and_one_percent_of_the_kaiming_scale(tiny_model):
    values = {n: v.clone() for n, v in tiny_model.initial_values().items()}
    posterior = pl.posterior(pl.guides.mean_field(tiny_model, init_scale=0.01))
    assert list(posterior.loc) == list(tiny_model.sites) == list(values)
    for site, fan_in in {"conv.weight": 9, "conv.bias": 9, "hidden.weight": 16, "out.bias": 6}.items():
        assert torch.equal(posterior.loc[site], values[site])
        torch.testing.assert_close(
            posterior.scale[site], torch.full_like(values[site], 0.01 * (2 / fan_in) ** 0.5), rtol=1e-6, atol=0
        )


def test_parameters_are_complete_before_first_use_and_load_into_a_fresh_object(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    names = dict(guide.named_parameters())
    state = {f"{kind}.{s}": torch.randn(shape) for kind in ("loc", "log_scale") for s, shape in guide.shapes.items()}
    assert set(guide.state_dict()) == set(state)
    guide.load_state_dict(state, strict=True)
    guide(tiny_data.test[:2])
    assert set(dict(guide.named_parameters())) == set(names)
    assert all(torch.equal(value, state[name]) for name, value in guide.state_dict().items())


def test_kl_equals_the_sum_of_torch_kls(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=0.5)
    posterior = pl.posterior(guide)
    expected = sum(
        kl_divergence(dist.Normal(posterior.loc[s].double(), posterior.scale[s].double()), dist.Normal(0.0, 1.0)).sum()
        for s in posterior.loc
    )
    terms = pl.ELBO().terms(tiny_model, guide, tiny_data.test[:2], tiny_data.test.labels[:2])
    assert terms.kl.item() == pytest.approx(0.1 * expected.item(), rel=1e-5)


def test_every_guide_knows_what_is_prunable(tiny_model):
    stock = AutoNormal(tiny_model)
    stock()
    for guide in (pl.guides.mean_field(tiny_model), pl.guides.auto(AutoDiagonalNormal, tiny_model), stock):
        assert pl.posterior(guide).prunable == ("conv.weight", "hidden.weight")
    pyro.clear_param_store()  # which a guide of Pyro's own keeps its parameters in


def test_same_family_as_stock_autonormal(tiny_model, tiny_data):
    ours, stock = pl.guides.mean_field(tiny_model), pl.guides.auto(AutoNormal, tiny_model)
    a, b = pl.posterior(ours), pl.posterior(stock)
    for site in a.loc:
        assert torch.equal(a.loc[site], b.loc[site])
        torch.testing.assert_close(a.scale[site], b.scale[site], rtol=1e-6, atol=0)
    draws = {"ours": [], "stock": []}
    for _ in range(400):
        for name, guide in (("ours", ours), ("stock", stock)):
            sample = guide()
            noise = [((sample[s] - a.loc[s]) / a.scale[s]).detach().flatten() for s in a.loc]
            draws[name].append(torch.cat(noise))
    for name, values in draws.items():  # 400 × 163 standard normal numbers
        values = torch.cat(values)
        count = len(values)
        assert abs(values.mean()) < 4 / count**0.5, name
        assert abs(values.var() - 1) < 4 * (2 / count) ** 0.5, name


def test_gradients_are_stock_autonormals_in_expectation(tiny_model, tiny_data):
    # Both see the same noise, one through AutoNormal's own graph: then not only the expectations are equal.
    ours, stock = pl.guides.mean_field(tiny_model, 0.3), pl.guides.auto(AutoNormal, tiny_model, 0.3)
    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]
    trace = poutine.trace(ours).get_trace(x, y)
    values = {name: trace.nodes[name]["value"].detach() for name in tiny_model.sites}
    (-poutine.trace(poutine.replay(tiny_model, trace=trace)).get_trace(x, y).log_prob_sum()).backward()
    latent = {f"{name}_unconstrained": value for name, value in values.items()}
    locs, scales = dict(stock.locs.named_parameters()), dict(stock.scales.named_parameters())
    weights = {}
    for name, value in latent.items():
        noise = (value - locs[name]).detach() / attrgetter(name.removesuffix("_unconstrained"))(stock.scales).detach()
        weights[name.removesuffix("_unconstrained")] = (
            locs[name] + attrgetter(name.removesuffix("_unconstrained"))(stock.scales) * noise
        )
    (-poutine.trace(poutine.condition(tiny_model, data=weights)).get_trace(x, y).log_prob_sum()).backward()
    for name, grad in ours.unpack(ours.loc.grad).items():
        torch.testing.assert_close(grad, locs[f"{name}_unconstrained"].grad, rtol=1e-4, atol=1e-4)
    for name, grad in ours.unpack(ours.log_scale.grad).items():
        # d/dlog σ = σ·d/dσ, and AutoNormal's σ is softplus of its parameter, with derivative 1 − exp(−σ)
        scale = attrgetter(name)(stock.scales).detach()
        expected = scales[f"{name}_unconstrained"].grad / (1 - (-scale).exp()) * scale
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [pl.guides.mean_field, lambda m: pl.guides.auto(AutoNormal, m)])
def test_restoring_a_posterior_gives_the_same_bits(make, tiny_model):
    guide = make(tiny_model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.copy_(torch.randn_like(parameter) * 3)
    saved = pl.posterior(guide)
    fresh = make(tiny_model)
    guides.set_posterior_(fresh, saved)
    again = pl.posterior(fresh)
    for site in saved.loc:
        assert torch.equal(saved.loc[site], again.loc[site])
        assert torch.equal(saved.scale[site], again.scale[site])


@pytest.mark.parametrize("constraint", [constraints.softplus_positive, constraints.positive])
def test_every_scale_has_its_parameter_back(constraint):
    # Where softplus is near log 2 its arguments lie more densely than its values.
    transform = transform_to(constraint)
    scale = transform(torch.linspace(-0.3, 0.3, 40_000))
    assert torch.equal(transform(preimage(transform, scale)), scale)


def test_a_joint_guide_is_restored_from_its_raw_parameters(tiny_model):
    guide = pl.guides.auto(AutoLowRankMultivariateNormal, tiny_model)
    with torch.no_grad():
        guide.cov_factor.normal_()
    saved = pl.posterior(guide)
    fresh = pl.guides.auto(AutoLowRankMultivariateNormal, tiny_model)
    guides.set_posterior_(fresh, saved)
    assert all(torch.equal(saved.scale[s], v) for s, v in pl.posterior(fresh).scale.items())
    # marginal scale: root of the diagonal of F Fᵀ + D, with the rows of the first site first
    posterior = guide.get_posterior()
    variance = (posterior.cov_factor @ posterior.cov_factor.mT).diagonal() + posterior.cov_diag
    torch.testing.assert_close(saved.scale["conv.weight"].flatten(), variance[:36].sqrt())


def test_a_rewind_copies_and_never_shares(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    kept = {site: loc.clone() for site, loc in start.loc.items()}
    guides.set_posterior_(guide, start)
    with torch.no_grad():
        guide.loc.add_(1.0)
    assert all(torch.equal(start.loc[s], kept[s]) for s in kept)
    assert all(torch.equal(tiny_model.initial_values()[s], kept[s]) for s in kept)


def test_pruned_scales_of_zero_come_back_as_one(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    scale = dict(start.scale) | {"out.bias": torch.zeros(3)}
    guides.set_posterior_(guide, Posterior(start.loc, scale, start.prunable))
    assert torch.equal(pl.posterior(guide).scale["out.bias"], torch.ones(3))


def test_wrong_sites_are_named(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    loc = {n: t for n, t in start.loc.items() if n != "conv.bias"}
    with pytest.raises(pl.UserError, match=r"loc/conv\.bias is missing"):
        guides.set_posterior_(guide, Posterior(loc, start.scale, start.prunable))
    with pytest.raises(pl.UserError, match="loc/extra is not in the network"):
        guides.set_posterior_(guide, Posterior(dict(start.loc) | {"extra": torch.ones(1)}, start.scale, start.prunable))
    wrong = dict(start.scale) | {"out.bias": torch.ones(2)}
    with pytest.raises(pl.UserError, match=r"scale/out\.bias is \(2,\)"):
        guides.set_posterior_(guide, Posterior(start.loc, wrong, start.prunable))


def test_scales_do_not_decay(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    decayed, rest = guides.parameter_groups(tiny_model, guide, 0.1)
    assert [id(p) for p in rest["params"]] == [id(guide.log_scale)]
    assert rest["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(guide.loc), *map(id, tiny_model.parameters())}


def test_the_temperature_scales_guide_and_prior_alike(tiny_model, tiny_data):
    for guide in (pl.guides.mean_field(tiny_model), pl.guides.auto(AutoDiagonalNormal, tiny_model)):
        q = poutine.trace(guide).get_trace()
        p = poutine.trace(poutine.replay(tiny_model, q)).get_trace(tiny_data.test[:5])
        assert {s["scale"] for s in q.nodes.values() if s["type"] == "sample"} == {0.1}
        assert p.nodes["conv.weight"]["scale"] == 0.1
        assert p.nodes["y"]["scale"] == 60 / 5


@pytest.mark.parametrize("kind", [None, AutoNormal, AutoDiagonalNormal])
def test_the_temperature_may_change_after_the_guide_was_built(kind, tiny_model, tiny_data):
    def kl(model, guide):
        torch.manual_seed(0)
        return pl.ELBO().terms(model, guide, tiny_data.test[:5], tiny_data.test.labels[:5]).kl.item()

    guide = pl.guides.mean_field(tiny_model) if kind is None else pl.guides.auto(kind, tiny_model)
    kl_of_a_tenth = kl(tiny_model, guide)
    copies = copy.deepcopy((tiny_model, guide))
    tiny_model.kl_temperature = 0.5
    assert kl(tiny_model, guide) == pytest.approx(5 * kl_of_a_tenth)
    assert kl(*copies) == kl_of_a_tenth
    copies[0].kl_temperature = 1.0
    assert kl(*copies) == pytest.approx(10 * kl_of_a_tenth)


@pytest.mark.parametrize("kind", [None, AutoNormal])
def test_copies_and_pickles_leave_the_living_guide_alone(kind, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model) if kind is None else pl.guides.auto(kind, tiny_model)
    model_copy, guide_copy = copy.deepcopy((tiny_model, guide))
    if kind is None:
        pickle.dumps(guide.state_dict())
    pl.train(tiny_model, guide, tiny_data, epochs=1, train_samples=1)
    pl.train(model_copy, guide_copy, tiny_data, epochs=1, train_samples=1)
    a, b = pl.posterior(guide), pl.posterior(guide_copy)
    assert all(torch.equal(a.loc[s], b.loc[s]) for s in a.loc)


def test_unknown_guides_are_named():
    with pytest.raises(pl.UserError, match="did you mean mean_field"):
        guides.check_name("meanfield")
    with pytest.raises(pl.UserError, match=r"--guide pyro\.no\.Such"):
        guides.check_name("pyro.no.Such")


def test_any_pyro_model_that_shows_its_sites():
    class Model(nn.Module):
        def forward(self, x):
            import pyro

            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=x[:, 0])

    guide = pl.guides.mean_field(Model(), 0.1, torch.ones(3, 2))
    assert guide(torch.ones(5, 2))["w"].shape == (2,)


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
def test_compressed_keeps_only_what_survives_and_puts_it_back(make, tiny_model, half_mask):
    guide = make(tiny_model)
    before, parameter = pl.posterior(guide), guide.loc
    survivors = sum(int(m.sum()) for m in half_mask.values())
    others = sum(v.numel() for n, v in before.loc.items() if n not in half_mask)
    with pl.handlers.sparsify(half_mask), guides.compressed(guide):
        assert all(p.numel() == survivors + others for p in guide.parameters())
        for site, value in guide().items():
            if site in half_mask:
                assert not value[~half_mask[site]].any()
        with torch.no_grad():
            guide.loc.add_(1)
        state = {name: value.clone() for name, value in guide.state_dict().items()}
        with torch.no_grad():
            guide.loc.zero_()
        guide.load_state_dict(state)
        inside = pl.posterior(guide)
    assert guide.loc is parameter
    after = pl.posterior(guide)
    for site, loc in before.loc.items():
        mask = half_mask.get(site, torch.ones_like(loc, dtype=torch.bool))
        for found in (inside, after):
            assert torch.equal(found.loc[site], torch.where(mask, loc + 1, 0.0))
        if before.scale is not None:
            assert torch.equal(inside.scale[site], torch.where(mask, before.scale[site], 0.0))
            assert torch.equal(after.scale[site], before.scale[site])


def test_a_compressed_guide_refuses_another_mask(tiny_model, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    other = {site: ~mask for site, mask in half_mask.items()}
    compressed = (pl.handlers.sparsify(half_mask), guides.compressed(guide))
    with compressed[0], compressed[1], pytest.raises(pl.UserError, match="another mask"), pl.handlers.sparsify(other):
        guide()
    guide()


def test_a_state_dict_that_does_not_fit_is_refused_by_site(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    state = guide.state_dict()
    wrong = state | {"loc.out.bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"loc\.out\.bias is \(4,\), but the site is \(3,\)"):
        guide.load_state_dict(wrong)
    del state["log_scale.conv.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*log_scale\.conv\.weight"):
        guide.load_state_dict(state | {"loc.nothing": torch.zeros(1)})


def test_convolution_weights_lie_in_channels_last_order(tiny_model):
    assert all(
        v.is_contiguous(memory_format=torch.channels_last)
        for v in pl.guides.mean_field(tiny_model)().values()
        if v.ndim == 4
    )


def test_compression_nests_keeps_frozen_parameters_frozen_and_copies(tiny_model, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    guide.log_scale.requires_grad_(False)
    size = guide.loc.numel()
    with pl.handlers.sparsify(half_mask), guides.compressed(guide):
        kept = guide.loc.numel()
        with guides.compressed(guide):
            guide()
        assert guide.loc.numel() == kept < size
        assert not guide.log_scale.requires_grad
        copy.deepcopy(guide)()
        with pytest.raises(pl.UserError, match="cannot be set"):
            pl.guides.set_posterior_(guide, pl.posterior(guide))
    assert guide.loc.numel() == size


def test_a_guides_state_is_loaded_though_another_modules_is_missing(tiny_model):
    both = nn.ModuleDict({"other": nn.Linear(2, 2), "guide": pl.guides.mean_field(tiny_model)})
    state = {name: torch.ones_like(v) for name, v in both.state_dict().items() if name.startswith("guide.")}
    both.load_state_dict(state, strict=False)
    assert (both["guide"].loc == 1).all()


def test_low_rank_marginals_are_its_covariances_diagonal(tiny_model):
    guide = pl.guides.auto(autoguide.AutoLowRankMultivariateNormal, tiny_model)
    with torch.no_grad():
        guide.cov_factor.copy_(torch.randn_like(guide.cov_factor))
    joint = guide.unmasked()
    posterior = pl.posterior(guide)
    flat = torch.cat([t.reshape(-1) for t in posterior.scale.values()])
    torch.testing.assert_close(flat**2, joint.covariance_matrix.diagonal())
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in posterior.loc.values()]), joint.loc)
    assert posterior.draws == 0


def test_a_covariance_too_large_for_the_machine_says_what_it_needs():
    model = pl.BayesianClassifier(pl.create_model("resnet20", 10), num_data=1)
    # n = 270,906 weights: at its peak training holds sixteen n² numbers of 4 bytes
    n = sum(t.numel() for t in model.initial_values().values())
    with pytest.raises(pl.UserError, match=f"over {n:,} weights needs {64 * n * n / 2**30:,.1f} GiB to train"):
        pl.guides.auto(autoguide.AutoMultivariateNormal, model)
    with pytest.raises(pl.UserError, match=f"over {n:,} weights needs"):
        pl.guides.auto(autoguide.AutoLaplaceApproximation, model).laplace_approximation()
    wide = pl.BayesianRegressor(nn.Linear(2000, 2000, bias=False), num_data=1, noise_scale=1.0)
    with pytest.raises(pl.UserError, match=f"over 4,000,000 weights needs {26 * 4e6**2 / 2**30:,.1f} GiB"):
        pl.guides.auto(autoguide.AutoStructured, wide)


def test_a_prior_over_less_than_the_real_line_is_refused(tiny_data):
    import pyro.distributions as dist

    from tests.conftest import TinyNet

    for prior in (dist.Uniform(-1.0, 1.0), dist.HalfNormal(1.0)):
        model = pl.BayesianClassifier(TinyNet(), prior, num_data=1)
        for make in (
            pl.guides.mean_field,
            lambda model: pl.guides.auto(autoguide.AutoNormal, model),
            lambda model: pl.guides.auto(autoguide.AutoDiagonalNormal, model),
        ):
            with pytest.raises(pl.UserError, match=r"prior of 'conv\.weight' is over .*, not all real numbers"):
                make(model)


def test_a_guide_that_has_not_met_its_model_is_named(tiny_model):
    for kind in (autoguide.AutoNormal, autoguide.AutoDiagonalNormal, autoguide.AutoIAFNormal, autoguide.AutoDelta):
        with pytest.raises(pl.UserError, match="has not met its model yet; build it with"):
            pl.posterior(kind(tiny_model))


def test_options_of_a_guide(tiny_model):
    assert pl.guides.auto(autoguide.AutoLowRankMultivariateNormal, tiny_model, rank=3).cov_factor.shape[1] == 3
    with pytest.raises(pl.UserError, match="unknown option of AutoLowRankMultivariateNormal 'rang': did you mean rank"):
        pl.guides.auto(autoguide.AutoLowRankMultivariateNormal, tiny_model, rang=3)
    with pytest.raises(pl.UserError, match=r"takes a class of pyro\.infer\.autoguide"):
        pl.guides.auto(lambda model: autoguide.AutoNormal(model), tiny_model)


def test_a_posterior_without_scales_changes_nothing(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    before = pl.posterior(guide)
    other = {name: value + 1 for name, value in before.loc.items()}
    with pytest.raises(pl.UserError, match="needs scales"):
        pl.guides.set_posterior_(guide, pl.Posterior(other, None, before.prunable))
    assert all(torch.equal(t, before.loc[n]) for n, t in pl.posterior(guide).loc.items())


class Skewed(autoguide.AutoIAFNormal):
    """A normalising flow: its marginals have no closed form."""


def test_marginals_without_closed_form_come_from_stated_draws(tiny_model):
    guide = pl.guides.auto(Skewed, tiny_model)
    first, again = pl.posterior(guide), pl.posterior(guide)
    assert first.draws == pl.guides.DRAWS
    assert all(torch.equal(first.loc[n], again.loc[n]) for n in first.loc), "the same draws each time"
    samples = [guide() for _ in range(400)]
    for name in first.loc:
        values = torch.stack([s[name] for s in samples])
        error = values.std(0) * (1 / 400 + 1 / first.draws) ** 0.5
        assert ((values.mean(0) - first.loc[name]).abs() < 5 * error).all()
        assert ((first.scale[name] / values.std(0)).log().abs() < 5 * (0.5 / 400 + 0.5 / first.draws) ** 0.5).all()
    few = pl.posterior(guide, draws=20)
    assert few.draws == 20
    with pytest.raises(pl.UserError, match="at least 2"):
        pl.posterior(guide, draws=1)


def test_a_guide_without_marginals_trains_is_scored_and_comes_back(tiny_model, tiny_data):
    guide = pl.guides.auto(Skewed, tiny_model)
    pl.train(tiny_model, guide, tiny_data, epochs=2, milestones=())
    posterior = pl.posterior(guide)
    scores = pl.scores.snr(posterior)
    assert all(t.isfinite().all() for t in scores.values())
    other = pl.guides.auto(Skewed, tiny_model)
    pl.guides.set_posterior_(other, posterior)
    assert all(torch.equal(t, pl.posterior(other).loc[n]) for n, t in posterior.loc.items())
    mask = pl.masks.shrink(pl.masks.full(posterior), scores, 0.5)
    with (
        pytest.raises(pl.UserError, match="no closed-form marginal over the surviving weights"),
        pl.handlers.sparsify(mask),
    ):
        other()


def _another(hidden=6):
    """A network with the sites of TinyNet, whose hidden layer may have another width, and its guide."""
    from tests.conftest import TinyNet

    net = TinyNet()
    net.hidden, net.out = nn.Linear(16, hidden), nn.Linear(hidden, 3)
    model = pl.BayesianClassifier(net, num_data=60, kl_temperature=0.1)
    return model, pl.guides.mean_field(model)


def _part(model, hidden="out.bias"):
    return pl.guides.auto(AutoNormal, poutine.block(model, hide=[hidden]))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda model: _another(hidden=5)[1], r"hidden\.weight is \(5, 16\), but the model's is \(6, 16\); hidden\.bias"),
        (lambda model: pl.guides.auto(AutoDiagonalNormal, _another(5)[0]), r"hidden\.weight is \(5, 16\), but the model's"),
        (lambda model: pl.guides.mean_field(pl.BayesianClassifier(nn.Linear(2, 3), num_data=60)), r"conv\.weight is miss"),
        (lambda model: pl.guides.mean_field(poutine.block(model, hide=["out.bias"])), r"of another model: out\.bias is m"),
        (_part, r"of another model: out\.bias is missing$"),
    ],
)  # fmt: skip
def test_a_guide_of_another_network_is_refused_before_the_first_step(guide, message, tiny_model, tiny_data):
    guide, state = guide(tiny_model), torch.get_rng_state()
    for use in (
        lambda: pl.train(tiny_model, guide, tiny_data, epochs=1),
        lambda: pl.predict(tiny_model, guide, tiny_data.test),
        lambda: pl.predict_mean(tiny_model, guide, tiny_data.test),
    ):
        with pytest.raises(pl.UserError, match=message):
            use()
    assert torch.equal(state, torch.get_rng_state()), "drew random numbers"


def test_a_guide_of_a_network_with_the_same_sites_and_shapes_is_taken(tiny_model, tiny_data):
    guide = _another()[1]
    pl.train(tiny_model, guide, tiny_data, epochs=1)
    assert pl.predict(tiny_model, guide, tiny_data.test).shape == (24, 3)
    joint = pl.guides.auto(AutoDiagonalNormal, _another()[0])
    state = torch.get_rng_state()
    guides.check_sites(tiny_model, joint)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_no_autoguide_is_refused_before_training_and_may_predict(tiny_model, tiny_data):
    def guide(*args):
        return {n: pyro.sample(n, dist.Delta(v, event_dim=v.dim())) for n, v in tiny_model.initial_values().items()}

    messenger = autoguide.AutoNormalMessenger(tiny_model)
    for each in (guide, messenger):
        for use in (
            lambda each=each: pl.train(tiny_model, each, tiny_data, epochs=1),
            lambda each=each: pl.posterior(each),
            lambda each=each: pl.predict_mean(tiny_model, each, tiny_data.test),
        ):
            with pytest.raises(pl.UserError, match=r"expected a guide of pyro_lottery\.guides or of Pyro's AutoGuides"):
                use()
    expected = pl.predict_mean(tiny_model, pl.guides.mean_field(tiny_model), tiny_data.test)
    torch.testing.assert_close(pl.predict(tiny_model, guide, tiny_data.test), expected)


def test_a_scale_that_is_not_a_number_is_not_taken_for_a_pruned_one(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    start = pl.posterior(guide)
    site = tiny_model.sites[0]
    scale = {**start.scale, site: torch.full_like(start.scale[site], torch.nan)}
    pl.guides.set_posterior_(guide, replace(start, scale=scale))
    assert pl.posterior(guide).scale[site].isnan().all()


def pulled(scale, tiny_model, tiny_data, **options):
    """The scales of a guide that 40 steps towards a prior of ``scale`` have trained, and the guide."""
    tiny_model.set_prior_(pl.priors.normal(scale))
    guide = pl.guides.mean_field(tiny_model, **options)
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    for _ in range(40):
        optimizer.zero_grad()
        pl.ELBO().terms(tiny_model, guide, tiny_data.test[:4], tiny_data.test.labels[:4]).kl.backward()
        optimizer.step()
    return pl.posterior(guide).scale, guide


def test_no_scale_exceeds_its_bound_and_one_at_the_bound_may_return(tiny_model, tiny_data, half_mask):
    scale, guide = pulled(1.0, tiny_model, tiny_data, init_scale=0.2, max_scale=0.25)
    assert all((s <= 0.25 * (1 + 1e-6)).all() for s in scale.values())
    assert all((s > 0.249).all() for s in scale.values())
    free, _ = pulled(1.0, tiny_model, tiny_data, init_scale=0.2)
    assert all((s > 0.5).all() for s in free.values())
    # what is drawn, the quantiles and the moments have the bound too, dense and under a mask
    for mask in ({}, half_mask):
        with pl.handlers.sparsify(mask):
            values = torch.stack([guide()["conv.bias"] for _ in range(400)])
            low, high = guide.quantiles([0.1586553, 0.8413447])["conv.bias"]
        assert values.std(0).max() < 0.25 * 1.2
        torch.testing.assert_close((high - low) / 2, torch.full_like(low, 0.25), rtol=1e-4, atol=0)
    tiny_model.set_prior_(pl.priors.normal(0.01))
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        pl.ELBO().terms(tiny_model, guide, tiny_data.test[:4], tiny_data.test.labels[:4]).kl.backward()
        optimizer.step()
    assert all((s < 0.2).all() for s in pl.posterior(guide).scale.values())


def test_bounds_that_do_not_hold_are_refused(tiny_model, tiny_data):
    with pytest.raises(pl.UserError, match=r"scale of 'conv\.weight' is to be 0\.4714, above max_scale 0\.1"):
        pl.guides.mean_field(tiny_model, init_scale=1.0, max_scale=0.1)
    with pytest.raises(pl.UserError, match="max_scale must be greater than 0"):
        pl.guides.mean_field(tiny_model, max_scale=0.0)
    guide = pl.guides.mean_field(tiny_model, max_scale=0.1)
    with pytest.raises(pl.UserError, match="above max_scale"):
        pl.guides.set_posterior_(guide, pl.posterior(pl.guides.mean_field(tiny_model, init_scale=1.0)))


def test_fixed_scales_stay_as_they_are(tiny_model, tiny_data, half_mask):
    guide = pl.guides.mean_field(tiny_model, train_scale=False)
    before = pl.posterior(guide)
    with pl.handlers.sparsify(half_mask):
        pl.train(tiny_model, guide, tiny_data, epochs=1, milestones=())
    after = pl.posterior(guide)
    assert all(torch.equal(before.scale[n], after.scale[n]) for n in before.loc)
    assert not torch.equal(before.loc["out.weight"], after.loc["out.weight"])
    assert not guide.log_scale.requires_grad
