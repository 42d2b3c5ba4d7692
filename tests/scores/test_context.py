"""Scores that see the prior, the network and the data."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import scores
from pyro_lottery.scores.before_training import LEAST, ROUNDS, flow
from pyro_lottery.tickets import rewind
from tests.support import TinyNet


def context_of(model, data, mask=None, dense=None, **more):
    start = pl.posterior(pl.guides.mean_field(model))
    dense = dense or rewind(pl.masks.full(start), start, model.net_state())
    return scores.Context(model, data, dense.mask if mask is None else mask, dense, **{"seed": 0, "level": 1} | more)


def linear(weight, count=6):
    """A regression without bias whose loss, gradient and Hessian are known."""
    net = nn.Sequential(nn.Linear(len(weight), 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([weight]))
    model = pl.BayesianRegressor(net, num_data=count, noise_scale=1.0)
    x = torch.randn(count, len(weight), generator=torch.Generator().manual_seed(3))
    y = x.sum(1, keepdim=True)
    data = pl.data.from_tensors(x, y, x, y, normalize=False)
    return model, data.train, x.double(), y.double()


def test_snip_and_grasp_of_a_regression_by_hand():
    w0 = [0.5, -1.0, 2.0]
    model, data, x, y = linear(w0)
    context = context_of(model, data)
    posterior, w = context.dense.start, torch.tensor([w0]).double()
    # L = mean (x w − y)² / 2 + const, of which all examples are one batch.
    gradient = ((x @ w.T - y) * x).mean(0)
    hessian = x.T @ x / len(x)
    site = "0.weight"
    torch.testing.assert_close(
        scores.snip(posterior, context)[site].double(), (w * gradient).abs(), rtol=1e-4, atol=1e-6
    )
    expected = w * (hessian @ gradient)
    torch.testing.assert_close(scores.grasp(posterior, context)[site].double(), expected, rtol=1e-4, atol=1e-6)


def test_synflow_is_the_flow_of_ones_and_is_conserved():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        net[2].weight.copy_(torch.tensor([[5.0, -6.0]]))
    model = pl.BayesianRegressor(net, num_data=4, noise_scale=1.0)
    x = torch.randn(4, 2)
    data = pl.data.from_tensors(x, x[:, :1], x, x[:, :1], normalize=False).train
    context = context_of(model, data)
    found = flow(context, {site: loc.abs() for site, loc in context.dense.start.loc.items()}, x)
    # R = 5 (1 + 2) + 6 (3 + 4); each weight's score is the flow through it.
    torch.testing.assert_close(found["0.weight"], torch.tensor([[5.0, 10.0], [18.0, 24.0]]).double())
    torch.testing.assert_close(found["2.weight"], torch.tensor([[15.0, 42.0]]).double())


def test_synflow_prunes_in_rounds_and_cuts_no_layer_off():
    """The flow of each layer is the same, so that of a weight in the wide one is small: in one round all of them go."""
    torch.manual_seed(0)
    widths = (4, 64, 64, 4, 1)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b, bias=False), nn.ReLU())]
    model = pl.BayesianRegressor(nn.Sequential(*layers[:-1]), num_data=4, noise_scale=1.0)
    x = torch.randn(4, 4)
    data = pl.data.from_tensors(x, x[:, :1], x, x[:, :1], normalize=False).train
    context = context_of(model, data)
    start = context.dense.start
    values = {site: loc.abs() for site, loc in start.loc.items()}
    full = pl.masks.full(start)

    def left(score, density):
        mask = pl.masks.shrink(full, score, 1 - density)
        kept = {site: value * mask.get(site, 1) for site, value in values.items()}
        return mask, sum(float(f.sum()) for f in flow(context, kept, x).values())

    order = scores.synflow(start, context)
    positions = torch.cat([order[site].flatten() for site in start.prunable]).sort().values
    assert positions.tolist() == list(range(len(positions)))
    once, through = left(flow(context, values, x), 0.02)
    assert not once["2.weight"].any()
    assert through == 0
    for density in (0.2, 0.02, 0.003):
        assert left(order, density)[1] > 0, density
    flows = flow(context, values, x)
    first, flat = (torch.cat([found[site].flatten() for site in start.prunable]) for found in (flows, order))
    number = len(flat) - round(len(flat) * LEAST ** (1 / (ROUNDS - 1)))
    assert set(first.argsort()[:number].tolist()) == set(flat.argsort()[:number].tolist())  # the first round


def test_pruned_weights_stay_pruned():
    model, data, x, y = linear([0.5, -1.0, 2.0])
    mask = {"0.weight": torch.tensor([[True, False, True]])}
    context = context_of(model, data, mask)
    w = torch.tensor([[0.5, 0.0, 2.0]]).double()
    gradient = ((x @ w.T - y) * x).mean(0)
    found = scores.snip(context.dense.start, context)["0.weight"].double()
    torch.testing.assert_close(found, (w * gradient).abs(), rtol=1e-4, atol=1e-6)
    assert scores.initial_magnitude(context.dense.start, context)["0.weight"].tolist() == [[0.5, 0.0, 2.0]]


def test_nothing_depends_on_what_the_model_holds(tiny_data):
    model = pl.BayesianClassifier(TinyNet(), num_data=60)
    context = context_of(model, tiny_data.train)
    before = {f.__name__: f(context.dense.start, context) for f in (scores.snip, scores.grasp, scores.synflow)}
    states = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in model.net_state().items():
        if value.is_floating_point():
            model.net.state_dict()[name].add_(1.0)
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    assert not all(torch.equal(states[name], changed[name]) for name in states), "TinyNet has normalisation"
    torch.randn(3)
    for name, values in before.items():
        again = scores.by_name(name)(context.dense.start, context)
        assert all(torch.equal(values[site], again[site]) for site in values), name
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())


def test_batches_follow_seed_and_level(tiny_data):
    model = pl.BayesianClassifier(TinyNet(), num_data=60)

    def labels(**more):
        found = list(context_of(model, tiny_data.train, **more).batches(3, 25))
        assert [len(y) for _, y in found] == [25, 25, 10]
        return torch.cat([y for _, y in found]).tolist()

    assert labels() == labels()
    assert labels() != labels(seed=1) != labels(seed=1, level=2)
    assert sorted(labels()) == sorted(tiny_data.train.targets.tolist())


def test_savage_dickey_by_hand():
    model, data, _, _ = linear([0.5, -1.0, 2.0])
    loc, scale = torch.tensor([[0.0, 0.2, 3.0]]), torch.tensor([[0.1, 0.1, 1.0]])
    posterior = pl.Posterior({"0.weight": loc}, {"0.weight": scale}, ("0.weight",))
    found = scores.savage_dickey(posterior, context_of(model, data))["0.weight"][0].tolist()
    # log N(0; 0, 1) − log N(0; μ, σ²) = log σ + μ² / (2 σ²)
    assert found == pytest.approx([math.log(0.1), math.log(0.1) + 2, 4.5], abs=1e-5)
    model.set_prior_(pl.priors.laplace(1.0))
    found = scores.savage_dickey(posterior, context_of(model, data))["0.weight"][0, 0].item()
    assert found == pytest.approx(math.log(0.5) - math.log(1 / (0.1 * math.sqrt(2 * math.pi))), abs=1e-5)


def test_what_savage_dickey_needs():
    model, data, _, _ = linear([0.5, -1.0, 2.0])
    context = context_of(model, data)
    point = pl.Posterior(context.dense.start.loc, None, ("0.weight",))
    with pytest.raises(pl.UserError, match="a point guide has none; use --score magnitude"):
        scores.savage_dickey(point, context)
    model.set_prior_(pl.priors.flat())
    with pytest.raises(pl.UserError, match=r"the prior of '0\.weight' is flat and has no density"):
        scores.savage_dickey(context.dense.start, context_of(model, data))


def test_log_alpha():
    posterior = pl.Posterior({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 20.0])}, ("w",))
    assert scores.log_alpha(posterior)["w"].tolist() == pytest.approx([0.0, -2 * math.log(10)], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in scores.SCORES if name not in scores.WITH_THRESHOLD])
def test_only_some_scores_say_which_weights_are_worth_nothing(name):
    assert scores.threshold_of(scores.by_name(name)) is None


def test_thresholds():
    assert scores.threshold_of(scores.savage_dickey) == 0
    assert scores.threshold_of(scores.log_alpha) == -3

    def own(posterior):
        return posterior.loc

    assert scores.threshold_of(own) is None
    own.threshold = 0.5
    assert scores.threshold_of(own) == 0.5


def test_which_scores_see_more():
    assert {name for name in scores.SCORES if scores.takes_context(scores.by_name(name))} == {
        "savage_dickey", "initial_magnitude", "snip", "grasp", "synflow",
    }  # fmt: skip
    assert not scores.takes_context(lambda posterior, power=2: posterior)
    assert scores.takes_context(lambda posterior, context, power=2: posterior)


def test_batches_of_a_loader_follow_seed_level_and_step():
    x, y = torch.arange(60.0).view(60, 1), torch.arange(60) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    model = pl.BayesianClassifier(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 3)), num_data=60)
    stream = pl.data.from_loaders(loader, loader).train

    def first(**more):
        return next(context_of(model, stream, **more).batches())[0].flatten().tolist()

    assert first() == first()
    assert first() != first(step=5)
    assert first() != first(level=2)
    assert [len(b[0]) for b in context_of(model, stream).batches(9)] == [16, 16, 16, 12]


def test_a_loss_does_not_depend_on_a_noise_that_was_learned():
    x = torch.randn(8, 3)
    y = torch.stack([x[:, 0], 3 * torch.randn(8)], 1)
    model = pl.BayesianRegressor(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), num_data=8, noise_scale="learned"
    )
    data = pl.data.from_tensors(x, y, x, y, normalize=False).train
    context = context_of(model, data)
    every = [score(context.dense.start, context) for score in (scores.snip, scores.grasp)]
    with torch.no_grad():
        for parameter in model.likelihood_parameters().values():
            parameter.add_(torch.tensor([-4.0, 1.0]))
    for before, score in zip(every, (scores.snip, scores.grasp), strict=True):
        again = score(context.dense.start, context_of(model, data, dense=context.dense))
        assert all(torch.equal(again[site], value) for site, value in before.items())


def in_place(posterior):
    for site, value in posterior.loc.items():
        value /= posterior.scale[site]
    return posterior.loc


def in_place_with_context(posterior, context):
    return {site: value.mul_(2) for site, value in context.dense.start.loc.items()}


@pytest.mark.parametrize("score", [in_place, in_place_with_context])
def test_a_score_that_works_in_place_changes_only_copies(score):
    model, data, _, _ = linear([0.5, -1.0, 2.0])
    context = context_of(model, data)
    found = scores.ranks(score, context.dense.start, context)["0.weight"]
    assert context.dense.start.loc["0.weight"].tolist() == [[0.5, -1.0, 2.0]]
    assert found.tolist() != [[0.5, -1.0, 2.0]]


def test_a_score_may_name_its_context():
    model, data, _, _ = linear([0.5, -1.0, 2.0])
    context = context_of(model, data)

    def seen(posterior, context=None):
        return context.level

    def by_keyword(posterior, *, context):
        return context.level

    def by_position(posterior, context, /):
        return context.level

    assert scores.ranks(seen, context.dense.start, context) == 1
    assert scores.ranks(by_position, context.dense.start, context) == 1
    assert scores.ranks(by_keyword, context.dense.start, context) == 1


def test_a_threshold_is_a_number():
    def score(posterior):
        return posterior.loc

    for wrong in ("0.1x", torch.zeros(2), float("nan")):
        score.threshold = wrong
        with pytest.raises(pl.UserError, match="the threshold of a score must be a number"):
            scores.threshold_of(score)


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_evidence_counts_weight_decay_as_a_part_of_the_prior(decay):
    """A weight of which the data say nothing has the posterior p(w) exp(−Nλw²/2T), and evidence for nothing."""
    model, data, _, _ = linear([0.5, -1.0, 2.0])
    model.kl_temperature = 0.1
    precision = 1 + 6 * decay / 0.1
    mean = torch.zeros(1, 3)
    posterior = pl.Posterior({"0.weight": mean}, {"0.weight": torch.full((1, 3), precision**-0.5)}, ("0.weight",))
    context = context_of(model, data, weight_decay=decay)
    torch.testing.assert_close(scores.savage_dickey(posterior, context)["0.weight"], torch.zeros(1, 3))
    model.set_prior_(pl.priors.laplace(1.0))
    if decay:
        with pytest.raises(pl.UserError, match="is a Laplace, with which it has no closed form; use --weight-decay 0"):
            scores.savage_dickey(posterior, context)


def test_the_prior_moves_with_weight_decay():
    """p = N(1, 2²) times exp(−3w²/2) is N(0.25/3.25, 1/3.25)."""
    model, data, _, _ = linear([0.5, -1.0, 2.0])
    model.set_prior_(pl.priors.normal(1.0, 2.0))
    q = torch.distributions.Normal(torch.tensor([[0.3, 0.0, -1.0]]), torch.tensor([[0.5, 1.0, 2.0]]))
    posterior = pl.Posterior({"0.weight": q.loc}, {"0.weight": q.scale}, ("0.weight",))
    found = scores.savage_dickey(posterior, context_of(model, data, weight_decay=0.5))
    p = torch.distributions.Normal(0.25 / 3.25, 3.25**-0.5)
    zero = torch.zeros(1, 3)
    torch.testing.assert_close(found["0.weight"], p.log_prob(zero) - q.log_prob(zero))


def three_layers(first, **more):
    net = nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(),
        nn.Linear(2, 1, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(first))
        net[3].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        net[5].weight.fill_(1.0)
    x = torch.randn(4, 2)
    data = pl.data.from_tensors(x, x[:, :1], x, x[:, :1], normalize=False).train
    return net, data, x


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_synflow_takes_all_parameters_by_their_size(sign):
    net, data, x = three_layers([[sign, sign], [1.0, 1.0]])
    net[0].weight.requires_grad_(False)
    with torch.no_grad():
        net[1].weight[0] = sign
    context = context_of(pl.BayesianRegressor(net, num_data=4, noise_scale=1.0), data)
    found = flow(context, {site: loc.abs() for site, loc in context.dense.start.loc.items()}, x)["3.weight"]
    torch.testing.assert_close(found, torch.tensor([[2.0, 4.0], [6.0, 8.0]]).double(), rtol=1e-4, atol=0)


def test_synflow_without_a_flow_is_one_line():
    net, data, _ = three_layers([[1.0, 1.0], [1.0, 1.0]])
    with torch.no_grad():
        net[5].weight.zero_()
    context = context_of(pl.BayesianRegressor(net, num_data=4, noise_scale=1.0), data)
    with pytest.raises(pl.UserError, match="no prunable weight has a flow"):
        scores.synflow(context.dense.start, context)

    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x):
            h = self.a(x)
            return self.b((h - h) / (h - h))

    context = context_of(pl.BayesianRegressor(Divides(), num_data=4, noise_scale=1.0), data)
    with pytest.raises(pl.UserError, match=r"the flow of 'a\.weight' is not finite"):
        scores.synflow(context.dense.start, context)


def test_grasp_of_attention(tiny_data):
    """Summed over all weights, w·(H g) is half the slope of |g|² along w."""
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.head = (nn.Linear(4, 4, bias=False) for _ in range(4))

        def forward(self, x):
            h = x.view(len(x), 3, 4)
            return self.head(nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)).mean(1))

    x, y = torch.randn(8, 12), torch.arange(8) % 4
    model = pl.BayesianClassifier(Attends(), num_data=8)
    context = context_of(model, pl.data.from_tensors(x, y, x, y, normalize=False).train)
    found = scores.grasp(context.dense.start, context)

    def size(scale):
        values = {site: (scale * loc.double()).requires_grad_() for site, loc in context.dense.start.loc.items()}
        gradients = torch.autograd.grad(context.loss(values, next(context.batches())), list(values.values()))
        return sum(float(g.square().sum()) for g in gradients)

    slope = (size(1 + 1e-5) - size(1 - 1e-5)) / 2e-5
    assert sum(float(value.sum()) for value in found.values()) == pytest.approx(slope / 2, rel=1e-3)
