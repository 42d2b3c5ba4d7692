"""The curvature of networks whose curvature is known."""

import importlib.util
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import posteriors


def logistic(count=40, features=3, classes=4):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, features, generator=generator)
    y = torch.randint(0, classes, (count,), generator=generator)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(features, classes))
    return net, pl.BayesianClassifier(net, num_data=count, kl_temperature=1.0), x, y


def weights(model):
    return {name: value.clone() for name, value in model.initial_values().items()}


def test_logistic_regression_by_its_closed_form():
    _, model, x, y = logistic()
    values = weights(model)
    found = posteriors.ggn_diagonal(model, values, {}, [(x[:25], y[:25]), (x[25:], y[25:])])
    p = (x @ values["0.weight"].T + values["0.bias"]).softmax(1)
    variance = p * (1 - p)
    torch.testing.assert_close(found["0.weight"], variance.T @ x**2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["0.bias"], variance.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("laplace") is None, reason="laplace-torch is not installed")
def test_logistic_regression_beside_laplace_torch():
    with warnings.catch_warnings(action="ignore"):  # torch's own, of what its packages use
        from laplace import Laplace

    _, model, x, y = logistic()
    values = weights(model)
    plain = nn.Sequential(nn.Linear(3, 4))
    plain.load_state_dict({"0.weight": values["0.weight"], "0.bias": values["0.bias"]})
    theirs = Laplace(plain, "classification", subset_of_weights="all", hessian_structure="diag", prior_precision=1.0)
    theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10))
    guide = pl.guides.laplace(model)
    data = pl.data.from_tensors(x, y, x, y, normalize=False)
    with pl.handlers.sparsify({}):
        posteriors.find_scales_(model, guide, data, {}, epoch=1, weight_decay=0.0)
    ours = pl.posterior(guide).scale
    flat = torch.cat([ours["0.weight"].flatten(), ours["0.bias"]])
    torch.testing.assert_close(flat, theirs.posterior_variance.sqrt(), rtol=1e-4, atol=1e-6)


def test_a_network_in_double_precision_takes_inputs_in_single():
    net = nn.Linear(3, 1, bias=False)
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    found = []
    for dtype in (torch.float32, torch.float64):
        own = nn.Sequential(nn.Linear(3, 1, bias=False)).to(dtype)
        model = pl.BayesianRegressor(own, pl.priors.normal(2.0), num_data=5, noise_scale=0.5)
        values = {"0.weight": net.weight.detach().to(dtype)}
        found.append(posteriors.curvature.ggn_diagonal(model, values, {}, [(x, y)])["0.weight"])
    assert found[1].dtype == torch.float64
    torch.testing.assert_close(found[0], found[1].float(), rtol=1e-4, atol=1e-6)


def test_a_regression_has_the_curvature_of_least_squares():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2, bias=False))
    model = pl.BayesianRegressor(net, num_data=10, noise_scale=0.5)
    x, y = torch.randn(10, 3), torch.randn(10, 2)
    found = posteriors.ggn_diagonal(model, weights(model), {}, [(x, y)])
    torch.testing.assert_close(found["0.weight"], (x**2).sum(0).expand(2, 3) / 0.25, rtol=1e-4, atol=1e-5)


def test_a_network_that_changes_its_input_and_a_hyperprior():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, x):
            return self.layer(x.mul_(2.0))

    torch.manual_seed(0)
    x, y = torch.randn(10, 3), torch.randn(10, 2)
    expected = (4 * x**2).sum(0).expand(2, 3)
    model = pl.BayesianRegressor(Doubled(), num_data=10, noise_scale=1.0)
    found = posteriors.ggn_diagonal(model, weights(model), {}, [(x, y)])
    torch.testing.assert_close(found["layer.weight"], expected, rtol=1e-4, atol=1e-5)

    def hyper(site, shape):
        return dist.Normal(0.0, pyro.sample("tau", dist.LogNormal(0.0, 1.0)))

    model = pl.BayesianRegressor(nn.Linear(3, 2), hyper, num_data=10, noise_scale=1.0)
    with pytest.raises(pl.UserError, match="laplace needs a prior without hyperpriors, but this one samples 'tau'"):
        posteriors.ggn_diagonal(model, model.initial_values(), {}, [(x, y)])


def test_a_network_by_its_whole_jacobian_with_a_convolution_and_batch_norm_in_eval_mode():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model = pl.BayesianClassifier(net, num_data=5)
    x, y = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    values = weights(model)
    mask = {"0.weight": torch.rand(2, 1, 3, 3) > 0.3}
    values["0.weight"] = values["0.weight"] * mask["0.weight"]
    found = posteriors.ggn_diagonal(model, values, mask, [(x, y)])
    model.eval()
    expected = {name: torch.zeros_like(value) for name, value in values.items()}
    for one in x:

        def outputs(*given, one=one):
            own = dict(zip(values, given, strict=True))
            h = nn.functional.conv2d(one[None], own["0.weight"], own["0.bias"])
            h = nn.functional.batch_norm(h, net[1].running_mean, net[1].running_var, net[1].weight, net[1].bias)
            return nn.functional.linear(h.relu().flatten(1), own["4.weight"], own["4.bias"])[0]

        jacobians = torch.autograd.functional.jacobian(outputs, tuple(values.values()))
        p = outputs(*values.values()).softmax(0)
        middle = torch.diag(p) - torch.outer(p, p)
        for name, jacobian in zip(values, jacobians, strict=True):
            flat = jacobian.flatten(1)
            expected[name] += (flat * (middle @ flat)).sum(0).view(values[name].shape)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (pl.priors.normal(0.5), lambda w: torch.full_like(w, 4.0)),
        (pl.priors.laplace(1.0), torch.zeros_like),
        (pl.priors.flat(), torch.zeros_like),
        (lambda site, shape: dist.StudentT(3.0, 0.0, 1.0), lambda w: 4 * (3 - w**2) / (3 + w**2) ** 2),
    ],
)
def test_the_curvature_of_priors(prior, expected):
    model = pl.BayesianClassifier(nn.Sequential(nn.Linear(3, 4)), prior, num_data=5)
    values = weights(model)
    found = posteriors.prior_precision(model, values)
    for name, value in values.items():
        torch.testing.assert_close(found[name], expected(value), rtol=1e-4, atol=1e-5)


def test_a_network_that_torch_func_cannot_take_is_one_line():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.a(x)
            return self.b(h if h.abs().max() > 0 else -h)

    model = pl.BayesianClassifier(Branches(), num_data=4)
    with pytest.raises(pl.UserError, match=r"laplace needs a gradient of each example, which torch\.func cannot take"):
        posteriors.ggn_diagonal(model, model.initial_values(), {}, [(torch.randn(4, 6), torch.arange(4) % 3)])
