"""Natural gradients against the authors' optimizer and a posterior that is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from ivon import IVON
from torch import nn

import pyro_lottery as pl
from pyro_lottery.guides.ivon import CURVATURE, RATE, Newton
from tests.support import QUICK, small_run, tiny

STEP = {"epochs": 3, "batch_size": 50, "train_size": 100, "test_size": 50}


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_steps_are_those_of_the_authors_optimizer(decay):
    """Both draw from the same weights with the same noise: g is the gradient at the sample, g' = g·noise − s that of log_scale."""
    torch.manual_seed(0)
    size, number, rate = 5, 40, 1e-3
    theirs = nn.Parameter(torch.randn(size))
    loc = nn.Parameter(theirs.detach().clone())
    log_scale = nn.Parameter(torch.full((size,), (number * CURVATURE) ** -0.5).log())
    other = IVON([theirs], RATE * rate, number, hess_init=CURVATURE - decay, beta2=0.9, weight_decay=decay)
    groups = [{"params": [loc], "weight_decay": decay}, {"params": [log_scale], "weight_decay": 0.0}]
    ours = Newton(groups, rate, loc, log_scale, 0.9, fused=True)
    ours.noise = 1 / number

    def gradient(w):
        return w**3 + torch.arange(5.0) * w - 1

    for step in range(20):
        torch.manual_seed(step)
        with other.sampled_params(train=True):
            theirs.grad = gradient(theirs.detach())
        other.step()
        torch.manual_seed(step)
        noise = torch.randn(size) * log_scale.detach().exp()
        loc.grad = gradient(loc.detach() + noise)
        log_scale.grad = loc.grad * noise - 1 / number
        ours.step()
        torch.testing.assert_close(loc.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)
    curvature = other.param_groups[0]["hess"] + decay
    torch.testing.assert_close(log_scale.detach().exp(), (number * curvature).rsqrt(), rtol=1e-4, atol=0)


def test_it_finds_the_posterior_of_a_conjugate_regression():
    """Columns of x are orthogonal, so that the posterior N(P⁻¹Xᵀy/σ², P⁻¹), P = XᵀX/σ² + 1/s², is mean field."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(64, 4)).Q * torch.tensor([8.0, 6.0, 4.0, 5.0])
    y = x @ torch.tensor([[1.0], [-0.5], [0.0], [0.3]]) + 0.5 * torch.randn(64, 1)
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    model = pl.BayesianRegressor(net, pl.priors.normal(2.0), num_data=64, noise_scale=0.5)
    guide, data = pl.guides.ivon(model), pl.data.from_tensors(x, y, x, y, normalize=False)
    pl.train(
        model, guide, data, epochs=1500, batch_size=64, weight_decay=0.0, lr=2e-3, milestones=(1000,), train_samples=2
    )
    precision = (x**2).sum(0) / 0.25 + 0.25
    found, expected = pl.posterior(guide), (x.T @ y)[:, 0] / 0.25 / precision
    scale = found.scale["0.weight"][0]
    assert float(((found.loc["0.weight"][0] - expected) * precision.sqrt()).abs().max()) < 0.1
    torch.testing.assert_close(scale * precision.sqrt(), torch.ones(4), rtol=0.05, atol=0)


def test_the_scale_begins_at_the_curvature_and_moves(tiny_data):
    model, guide = tiny(pl.guides.ivon)
    first = (model.num_data * CURVATURE) ** -0.5
    torch.testing.assert_close(guide.log_scale.detach().exp(), torch.full_like(guide.loc, first).detach())
    pl.train(
        model,
        guide,
        tiny_data,
        **QUICK | {"epochs": 1, "batch_size": len(tiny_data.train), "lr": 0.0, "weight_decay": 0.1},
    )
    moved = guide.log_scale.detach().exp() / first
    assert float(moved.max()) < 2**0.5 + 1e-4  # one step leaves at least half of h+λ, whatever it finds
    assert float(moved.std()) > 0
    _, wide = tiny(lambda model: pl.guides.ivon(model, 0.02))
    torch.testing.assert_close(wide.log_scale.detach().exp(), torch.full_like(guide.loc, 2 * first).detach())


@pytest.mark.parametrize("rewind", ["init", "lr"])
def test_a_level_begins_where_its_ticket_says(rewind, tmp_path):
    run = small_run(
        tmp_path / "run",
        guide="ivon",
        levels=1,
        rewind=rewind,
        lr=1e-9,
        weight_decay=0.0,
        epochs=1,
        batch_size=100,
        train_size=100,
        test_size=50,
    )
    start, trained, mask = run.level(1).ticket.start, run.level(1).posterior, run.level(1).mask
    for site, kept in mask.items():
        ratio = trained.scale[site][kept] / start.scale[site][kept]
        assert float(ratio.max()) < 2**0.5 + 1e-4  # one step


def test_a_model_without_a_number_of_examples():
    with pytest.raises(pl.UserError, match="ivon needs the number of training examples"):
        pl.guides.ivon(lambda: pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1)))


def test_a_moving_mask(tmp_path):
    run = small_run(tmp_path / "run", guide="ivon", schedule="dynamic", prune_to=0.1, levels=0, **STEP)
    posterior, mask = run.level(0).posterior, run.level(0).mask
    for site, kept in mask.items():
        assert bool((posterior.scale[site][kept] > 0).all())
        assert not bool(posterior.loc[site][~kept].any())


def test_no_kl_warmup(tiny_data):
    model, guide = tiny(pl.guides.ivon)
    with pytest.raises(pl.UserError, match="reads its scales from the curvature, which a KL warm-up would change"):
        pl.train(model, guide, tiny_data, **QUICK, kl_warmup_epochs=1)
