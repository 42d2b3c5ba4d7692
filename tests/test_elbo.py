import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_lottery as pl


@pytest.mark.slow
def test_conjugate_linear_regression_meets_the_exact_posterior():
    # y = Xw + noise with w ~ N(0, s²) has a Gaussian posterior in closed form; with orthogonal columns it is
    # mean-field, so the trained loc and scale must equal it.
    generator = torch.Generator().manual_seed(0)
    x, _ = torch.linalg.qr(torch.randn(40, 3, generator=generator))
    x = x * torch.tensor([8.0, 4.0, 2.0])
    noise, prior_scale, temperature = 0.5, 0.7, 0.3
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + noise * torch.randn(40, 1, generator=generator)
    precision = (x**2).sum(0) / noise**2 + temperature / prior_scale**2  # of the tempered posterior, over T
    loc = (x.mT @ y).squeeze(1) / noise**2 / precision
    scale = (temperature / precision).sqrt()

    model = pl.BayesianRegressor(
        nn.Linear(3, 1, bias=False), pl.priors.normal(prior_scale), num_data=40, noise_scale=noise,
        kl_temperature=temperature,
    )  # fmt: skip
    guide = pl.guides.mean_field(model, init_scale=0.1)
    optimizer = torch.optim.Adam(guide.parameters(), 0.02)
    elbo = pl.ELBO(num_particles=3)
    average = {name: torch.zeros_like(value) for name, value in guide.state_dict().items()}
    for step in range(2000):
        if step == 1000:
            optimizer.param_groups[0]["lr"] = 0.004
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, x, y).backward()
        optimizer.step()
        if step >= 1000:  # averaged iterates: 3,000 draws leave about 1 % of noise in a scale
            for name, value in guide.state_dict().items():
                average[name] += value / 1000
    guide.load_state_dict(average)
    posterior = pl.posterior(guide)
    torch.testing.assert_close(posterior.loc["weight"].squeeze(0), loc, rtol=0, atol=0.01)
    torch.testing.assert_close(posterior.scale["weight"].squeeze(0), scale, rtol=0.04, atol=0)


def test_analytic_and_monte_carlo_kl_have_the_same_expectation(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale=0.5)
    x, y = tiny_data.test[:2], tiny_data.test.labels[:2]
    exact = pl.ELBO("analytic").terms(tiny_model, guide, x, y).tempered_kl.item()
    draws = torch.stack(
        [pl.ELBO("monte_carlo").terms(tiny_model, guide, x, y).tempered_kl for _ in range(400)]
    ).detach()
    assert abs(draws.mean() - exact) < 4 * draws.std() / 400**0.5


# TraceMeanField_ELBO asks torch for the KL of every site, ours takes all in one pass.
@pytest.mark.parametrize(
    ("kl", "stock_elbo", "init_scale"), [("monte_carlo", Trace_ELBO, 0.01), ("analytic", TraceMeanField_ELBO, 0.3)]
)
def test_equals_a_stock_elbo_draw_by_draw(kl, stock_elbo, init_scale, tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model, init_scale)
    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]
    tiny_model.eval()
    gradients = []
    for elbo in (pl.ELBO(kl), stock_elbo()):
        torch.manual_seed(2)
        loss = elbo.differentiable_loss(tiny_model, guide, x, y)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, list(guide.parameters()))))
    for ours, stock in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_closed_forms_are_counted_once_for_several_samples(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    x, y = tiny_data.test[:4], tiny_data.test.labels[:4]
    elbo, whole = pl.ELBO(), pl.ELBO().terms(tiny_model, guide, x, y).tempered_kl
    shares = [elbo.terms(tiny_model, guide, x, y, closed_forms=c).tempered_kl.item() for c in (3, 0, 0)]
    assert sum(shares) / 3 == pytest.approx(whole.item())
    assert shares[1] == 0


def test_a_prior_without_closed_form_is_sampled():
    def value(kl):
        torch.manual_seed(4)
        return pl.ELBO(kl).terms(model, guide, torch.ones(2, 3), torch.zeros(2).long()).tempered_kl.item()

    model = pl.BayesianClassifier(nn.Linear(3, 2), pl.priors.student_t(), num_data=2)
    guide = pl.guides.mean_field(model)
    assert value("analytic") == value("monte_carlo")


@pytest.mark.parametrize("prior", [pl.priors.normal(0.3, 2.0), pl.priors.laplace(0.5)])
def test_closed_forms_are_exact_and_do_not_jitter(prior):
    model = pl.BayesianClassifier(nn.Linear(3, 2), prior, num_data=2)
    guide = pl.guides.mean_field(model, init_scale=1.0)
    args = torch.ones(2, 3), torch.zeros(2).long()
    values = [pl.ELBO().terms(model, guide, *args).tempered_kl.item() for _ in range(3)]
    assert len(set(values)) == 1
    draws = torch.stack([pl.ELBO("monte_carlo").terms(model, guide, *args).tempered_kl for _ in range(1000)]).detach()
    assert abs(draws.mean() - values[0]) < 4 * draws.std() / 1000**0.5


def test_a_flat_prior_and_a_point_guide_are_maximum_likelihood(tiny_data):
    from tests.support import TinyNet

    model = pl.BayesianClassifier(TinyNet(), pl.priors.flat(), num_data=60)
    terms = pl.ELBO().terms(model, pl.guides.deterministic(model), tiny_data.test[:4], tiny_data.test.labels[:4])
    assert terms.tempered_kl.item() == 0


def test_honours_poutine_scale_and_mask(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    whole = pl.ELBO().terms(tiny_model, guide, *args)
    with poutine.scale(scale=3.0):
        scaled = pl.ELBO().terms(tiny_model, guide, *args)
    assert scaled.tempered_kl.item() == pytest.approx(3 * whole.tempered_kl.item())
    with poutine.mask(mask=False):
        masked = pl.ELBO().terms(tiny_model, guide, *args)
    assert masked.tempered_kl.item() == masked.nll.item() == 0


def test_a_guide_without_the_temperature_is_refused(tiny_model, tiny_data):
    guide = AutoNormal(tiny_model)
    guide()
    with pytest.raises(pl.UserError, match=r"scaled by 0\.1 but the guide by 1\.0"):
        pl.ELBO().terms(tiny_model, guide, tiny_data.test[:2], tiny_data.test.labels[:2])
    pyro.clear_param_store()


def test_num_particles_average(tiny_model, tiny_data):
    tiny_model.eval()
    guide = pl.guides.mean_field(tiny_model)
    args = tiny_data.test[:4], tiny_data.test.labels[:4]
    torch.manual_seed(0)
    two = pl.ELBO(num_particles=2).loss(tiny_model, guide, *args)
    torch.manual_seed(0)
    singles = [pl.ELBO().loss(tiny_model, guide, *args) for _ in range(2)]
    assert two == pytest.approx(sum(singles) / 2, rel=1e-6)
    with pytest.raises(pl.UserError, match="unknown kl"):
        pl.ELBO("exact")
