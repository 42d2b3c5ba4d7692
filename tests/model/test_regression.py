import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn
from torch.nn import functional as F

import pyro_lottery as pl


def nll(model, x, y):
    return pl.ELBO().terms(model, pl.guides.deterministic(model), x, y).nll.item()


@pytest.mark.parametrize("noise_scale", [0.5, torch.tensor([0.5, 2.0]), nn.Parameter(torch.tensor([0.5, 2.0])), 1])
def test_given_noise_is_the_targets_standard_deviation(noise_scale):
    x, y, net = torch.randn(5, 3), torch.randn(5, 2), nn.Linear(3, 2)
    mean = net(x).detach()
    model = pl.BayesianRegressor(net, num_data=5, noise_scale=noise_scale)
    scale = torch.as_tensor(noise_scale).detach().expand(2)
    by_hand = 0.5 * ((y - mean) / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi)
    assert nll(model, x, y) == pytest.approx(by_hand.sum().item(), rel=1e-6)
    assert torch.equal(torch.as_tensor(model.noise_scale).expand(2), scale)


class Mean(nn.Module):
    """Outputs [n, channels, time], or of fewer dimensions."""

    def __init__(self, dims):
        super().__init__()
        self.conv, self.dims = nn.Conv1d(1, 2, 3, padding=1), dims

    def forward(self, x):
        out = self.conv(x)
        return [out[:, 0, 0], out[:, :, 0], out][self.dims - 1]


@pytest.mark.parametrize(
    ("dims", "outputs", "shape"),
    [
        (1, (), (4,)),
        (1, 1, (4,)),
        (2, None, (4, 2)),
        (3, (2, 1), (4, 2, 6)),
        (3, (2, 6), (4, 2, 6)),
        (3, (), (4, 2, 6)),
    ],
)
def test_outputs_of_any_number_of_dimensions(dims, outputs, shape):
    x, y = torch.randn(4, 1, 6), torch.randn(shape)
    model = pl.BayesianRegressor(Mean(dims), num_data=4, noise_scale="learned", outputs=outputs)
    with torch.no_grad():
        model.log_noise_scale.fill_(math.log(0.5))
    terms = pl.ELBO().terms(model, pl.guides.deterministic(model), x, y)
    assert terms.output.shape == shape
    assert terms.nll.item() == pytest.approx(-torch.distributions.Normal(terms.output, 0.5).log_prob(y).sum().item())


def test_predicted_noise_is_the_second_half_of_the_outputs():
    model = pl.BayesianRegressor(nn.Linear(3, 4), num_data=5, noise_scale="predicted")
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    out = F.linear(x, *model.initial_values().values())
    by_hand = -torch.distributions.Normal(out[:, :2], out[:, 2:].exp()).log_prob(y).sum()
    assert nll(model, x, y) == pytest.approx(by_hand.item(), rel=1e-6)
    tally = model.tally(out, y)
    torch.testing.assert_close(tally, (out[:, :2] - y).square().sum() / 2)
    with pytest.raises(pl.UserError, match="predicts a noise_scale for each example"):
        _ = model.noise_scale
    odd = pl.BayesianRegressor(nn.Linear(3, 3), num_data=5, noise_scale="predicted")
    with pytest.raises(pl.UserError, match=r"must be \[n, 2d\], d means and d log-scales, got \(5, 3\)"):
        odd(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"noise_scale": wrong}, "noise_scale must be positive and finite") for wrong in
          (0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0]), torch.tensor([math.nan]), torch.zeros(0), None, True,
           nn.Parameter(torch.tensor(-1.0)), [1.0, "a"], 1j)),
        ({"noise_scale": "learn"}, "unknown noise_scale 'learn': did you mean learned"),
        ({"noise_scale": torch.ones(2, requires_grad=True)}, r"that requires a gradient must be an nn\.Parameter"),
        ({"noise_scale": 1.0, "outputs": 2}, 'outputs is only for noise_scale="learned", as its number of scales'),
    ],
)  # fmt: skip
def test_wrong_noise_is_named_before_the_network_is_changed(options, message):
    net = nn.Linear(3, 2)
    with pytest.raises(pl.UserError, match=message) as raised:
        pl.BayesianRegressor(net, num_data=4, **options)
    assert "\n" not in str(raised.value)
    assert type(net) is nn.Linear


def test_scales_that_do_not_fit_the_outputs_are_named():
    for noise_scale, net, x, message in (
        (torch.ones(3), nn.Linear(3, 2), torch.randn(4, 3), r"has shape \(2,\), but noise_scale has shape \(3,\); give one scale per output"),
        (torch.ones(4, 2), nn.Linear(3, 2), torch.randn(4, 3), r"has shape \(2,\), but noise_scale has shape \(4, 2\)"),
        ("learned", Mean(3), torch.randn(4, 1, 2), r"has shape \(2, 2\), but noise_scale has shape \(2,\); give outputs=\(2, 2\)"),
        ("learned", Mean(1), torch.randn(4, 1, 2), r"has shape \(\), but noise_scale has shape \(2,\); give outputs=\(\)"),
        ("learned", nn.Sequential(nn.Linear(3, 1), nn.Upsample(5)), torch.randn(4, 1, 3), "give outputs="),
    ):  # fmt: skip
        model = pl.BayesianRegressor(net, num_data=4, noise_scale=noise_scale)
        with pytest.raises(pl.UserError, match=message):
            model(x)
    with pytest.raises(pl.UserError, match="it needs a Linear, Conv"):
        pl.BayesianRegressor(nn.Upsample(5), num_data=4, noise_scale="learned")
    one = pl.BayesianRegressor(nn.Linear(3, 2), num_data=4, noise_scale=[0.5])  # on purpose for both
    assert one.likelihood(torch.zeros(4, 2)).base_dist.scale.tolist() == [[0.5, 0.5]] * 4


SLOPES = torch.tensor([[1.0, -0.5], [-2.0, 3.0], [0.5, 0.0]])


def simulated(noise, count=8000):
    """y = Xw + noise, a linear regression."""
    x = torch.randn(count, 3)
    return x, x @ SLOPES[:, : len(noise)] + torch.tensor(noise) * torch.randn(count, len(noise))


def residuals(x, y):
    """Root mean squares of the least-squares residuals: the scales of greatest likelihood."""
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    return (y - design @ torch.linalg.lstsq(design, y).solution).square().mean(0).sqrt()


@pytest.fixture(scope="module")
def conjugate():
    """A linear regression with orthogonal columns, trained by pl.train; with its exact posterior's loc and scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(40, 3, generator=generator))[0] * torch.tensor([8.0, 4.0, 2.0])
    y = x @ SLOPES[:, :1] + 0.5 * torch.randn(40, 1, generator=generator)
    precision = (x**2).sum(0) / 0.25 + 1 / 0.49
    net = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(net.weight)
    model = pl.BayesianRegressor(net, pl.priors.normal(0.7), num_data=40, noise_scale=0.5)
    guide = pl.guides.mean_field(model, init_scale=0.1)
    data = pl.data.from_tensors(x, y, x, y, normalize=False)
    history = pl.train(
        model, guide, data, epochs=300, batch_size=40, lr=0.05, milestones=(60, 120), weight_decay=0.0, estimator="local",
        train_samples=8, history_samples=1,
    )  # fmt: skip
    return model, guide, history, (x.mT @ y).squeeze(1) / 0.25 / precision, precision.rsqrt()


@pytest.mark.slow
def test_conjugate_regression_by_train_meets_the_exact_posterior(conjugate):
    _, guide, history, loc, scale = conjugate
    found = pl.posterior(guide)
    torch.testing.assert_close(found.loc["weight"][0], loc, rtol=0.02, atol=0)
    torch.testing.assert_close(found.scale["weight"][0], scale, rtol=0.02, atol=0)
    assert history[-1]["train_rmse"] == pytest.approx(0.5, rel=0.25)


@pytest.mark.slow
def test_its_predictive_is_the_exact_one_and_covers_fresh_points(conjugate):
    model, guide, _, loc, scale = conjugate
    x = torch.randn(2000, 3)
    y = x @ SLOPES[:, :1] + 0.5 * torch.randn(2000, 1)
    torch.manual_seed(1)
    found = pl.predictive(model, guide, x, 200)
    spread = ((x * scale) ** 2).sum(1, keepdim=True).sqrt()
    exact = dist.Normal((x @ loc)[:, None], (spread**2 + 0.25).sqrt())
    assert found.epistemic.div(spread).mean().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(found.aleatoric, torch.full((2000, 1), 0.5))
    assert (found.interval(0.95)[1] - exact.icdf(torch.tensor(0.975))).abs().mean() < 0.05
    measured = pl.metrics.regression(found, y)
    assert 0.92 < measured["coverage_95"] < 0.98
    assert measured["coverage_50"] == pytest.approx(0.5, abs=0.04)
    assert measured["rmse"] == pytest.approx((y - exact.mean).square().mean().sqrt().item(), rel=0.01)
    assert measured["nll"] == pytest.approx(-exact.log_prob(y).mean().item(), rel=0.01)


@pytest.mark.parametrize("kind", ["learned", "parameter"])
def test_learned_noise_is_the_truth(kind):
    truth = [0.3, 2.0]
    data = pl.data.from_tensors(*simulated(truth), *simulated(truth, 2000), normalize=False)
    noise_scale = "learned" if kind == "learned" else nn.Parameter(torch.ones(2))
    model = pl.BayesianRegressor(nn.Linear(3, 2), num_data=8000, noise_scale=noise_scale)
    guide = pl.guides.mean_field(model)
    pl.train(model, guide, data, epochs=60, batch_size=1000, lr=0.05, milestones=(40, 50))
    torch.testing.assert_close(model.noise_scale.detach(), torch.tensor(truth), rtol=0.05, atol=0)
    assert kind == "learned" or model.noise_scale is noise_scale
    found = pl.metrics.regression(pl.predictive(model, guide, data.test), data.test.targets)
    assert 0.92 < found["coverage_95"] < 0.98


def test_predicted_noise_is_the_truth_for_each_example():
    def draw(count):
        x = torch.rand(count, 1) * 2 - 1
        return x, 3 * x + (x - 1).exp() * torch.randn(count, 1)

    data = pl.data.from_tensors(*draw(8000), *draw(2000), normalize=False)
    model = pl.BayesianRegressor(nn.Linear(1, 2), num_data=8000, noise_scale="predicted")
    guide = pl.guides.mean_field(model)
    history = pl.train(model, guide, data, epochs=30, batch_size=1000, lr=0.05, milestones=(20, 25))
    found = pl.predictive(model, guide, data.test)
    torch.testing.assert_close(found.aleatoric, (data.test[:] - 1).exp(), rtol=0.07, atol=0)
    measured = pl.metrics.regression(found, data.test.targets)
    assert 0.92 < measured["coverage_95"] < 0.98
    assert measured["rmse"] == pytest.approx(history[-1]["test_rmse"], rel=0.01)


class Counts(pl.BayesianNetwork):
    """Poisson rates with a factor of its own, as a parameter and a module."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.log_rate = nn.Parameter(torch.zeros(()))
        self.offset = nn.Linear(1, 1)
        self.register_buffer("seen", torch.tensor(3))

    def likelihood(self, output):
        return dist.Poisson(self.offset(output[:, :1].exp())[:, 0].abs() + self.log_rate.exp())


def test_what_a_likelihood_learns_does_not_decay():
    model = Counts(nn.Linear(3, 2), {"weight": pl.priors.normal(1.0), "*": None}, num_data=9)
    guide = pl.guides.mean_field(model)
    decayed, rest = pl.guides.parameter_groups(model, guide, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in decayed["params"]} == {id(guide.loc), id(model.net.bias)}
    assert rest["weight_decay"] == 0
    own = [model.log_rate, *model.offset.parameters()]
    assert {id(p) for p in rest["params"]} == {id(guide.log_scale), *map(id, own)}
    assert list(model.likelihood_parameters()) == ["log_rate", "offset.weight", "offset.bias"]
    model.borrowed = model.net.bias  # the network's own stays the network's
    assert list(model.likelihood_parameters()) == ["log_rate", "offset.weight", "offset.bias"]


def test_what_a_likelihood_learns_is_trained_by_svi_with_an_optimizer_of_pyro():
    x, y = simulated([0.3])
    model = pl.BayesianRegressor(nn.Linear(3, 1), num_data=8000, noise_scale="learned")
    svi = SVI(model, pl.guides.mean_field(model), pyro.optim.Adam({"lr": 0.05}), loss=pl.ELBO())
    for _ in range(400):
        svi.step(x, y)
    torch.testing.assert_close(model.noise_scale.detach(), residuals(x, y), rtol=0.03, atol=0)


@pytest.mark.parametrize("make", [Counts, lambda net, num_data: pl.BayesianRegressor(net, num_data=num_data, noise_scale="learned")])  # fmt: skip
def test_what_a_likelihood_learns_is_saved_rewound_and_restored_with_a_ticket(make, tmp_path):
    model = make(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), num_data=9)
    guide = pl.guides.mean_field(model)
    with torch.no_grad():
        for parameter in model.likelihood_parameters().values():
            parameter.copy_(torch.randn(parameter.shape))
    state, start = model.net_state(), pl.posterior(guide)
    assert set(state) == {f"likelihood/{name}" for name in model.state_dict() if not name.startswith("net.")}
    assert state
    pl.tickets.rewind(pl.masks.full(start), start, state).save(tmp_path / "ticket.safetensors")
    start.save(tmp_path / "posterior.safetensors", state)
    loaded = pl.Ticket.load(tmp_path / "ticket.safetensors")
    assert all(torch.equal(pl.Posterior.load(tmp_path / "posterior.safetensors")[1][n], t) for n, t in state.items())

    fresh = make(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), num_data=9)
    before = fresh.net_state()
    fresh.start_from_(pl.guides.mean_field(fresh), loaded)
    assert all(torch.equal(fresh.net_state()[name], value) for name, value in state.items())
    fresh.load_net_state(before)
    assert all(torch.equal(fresh.net_state()[name], value) for name, value in before.items())
    name = next(iter(state))
    with pytest.raises(pl.UserError, match=f"net/{name} is missing"):
        fresh.load_net_state({n: t for n, t in state.items() if n != name})
    with pytest.raises(pl.UserError, match=f"net/{name} holds values that are not finite"):
        fresh.load_net_state(state | {name: torch.full_like(state[name], math.nan)})


def test_a_transplant_of_plain_weights_keeps_the_models_own_noise():
    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model = pl.BayesianRegressor(copy.deepcopy(plain), num_data=9, noise_scale="learned")
    with torch.no_grad():
        model.log_noise_scale.copy_(torch.tensor([0.5, -0.5]))
    start = pl.posterior(pl.guides.mean_field(model))
    dense = pl.tickets.rewind(pl.masks.full(start), start, model.net_state())
    found = pl.tickets.transplant(plain.state_dict(), None, dense)
    assert found.net["likelihood/log_noise_scale"].tolist() == [0.5, -0.5]
    given = plain.state_dict() | {"likelihood/log_noise_scale": torch.tensor([1.0, 2.0])}  # of a ticket
    assert pl.tickets.transplant(given, None, dense).net["likelihood/log_noise_scale"].tolist() == [1.0, 2.0]
