"""A bystander's Pyro models give the same bits and the same store without this package, and with it before or after."""

import copy
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_lottery as pl
from tests.support import TinyNet

BYSTANDER = """
import hashlib, io, sys
{before}
import pyro, torch
import pyro.contrib.gp as gp
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample, PyroParam
from torch import nn
torch.manual_seed(0)
x = torch.linspace(-1, 1, 12)
y = x.sin()


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](1, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x, y=None):
        mean = self.layer(x[:, None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


plain = nn.Linear(1, 1)


def registered(x, y):
    pyro.module("plain", plain)
    loc = pyro.param("loc", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(plain(x[:, None]).squeeze(-1) + loc, 1.0), obs=y)


net = Net()
kernel = gp.kernels.RBF(input_dim=1)
process = gp.models.GPRegression(x, y, kernel)
pairs = [(net, AutoNormal(net)), (net, AutoDiagonalNormal(net)), (registered, lambda x, y: None)]
{between}
digests = []
for model, guide in pairs:
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({{"lr": 0.05}}), Trace_ELBO())
    for step in range(5):
        svi.step(x, y)
    {during}
    names = sorted(pyro.get_param_store().keys())
    digests += [names, [pyro.param(n).detach().reshape(-1).tolist() for n in names]]
    digests.append(sorted(pyro.get_param_store().get_state()["params"]))
pyro.clear_param_store()
optimizer = torch.optim.Adam(process.parameters(), lr=0.05)
loss = Trace_ELBO().differentiable_loss
for step in range(5):
    optimizer.zero_grad()
    loss(process.model, process.guide).backward()
    optimizer.step()
digests += [[p.detach().reshape(-1).tolist() for p in process.parameters()], sorted(pyro.get_param_store().keys())]
print(digests)
"""
IMPORT = "import pyro_lottery as pl"
USE = """
    torch_state = torch.get_rng_state()
    ours = pl.BayesianRegressor(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)), num_data=12, noise_scale=1.0)
    theirs = pl.guides.mean_field(ours)
    with pl.handlers.sparsify(dict(zip(["0.weight"], [torch.tensor([[True], [False]])]))), pl.guides.compressed(theirs):
        pl.ELBO()(ours, theirs)(x[:, None], y[:, None]).backward()
    torch.set_rng_state(torch_state)
"""


@pytest.mark.slow
def test_a_bystanders_models_give_the_same_bits_without_the_import_before_and_after_it():
    places = {
        "without": ("", "", "pass"), "before": (IMPORT, "", "pass"), "after": ("", IMPORT, "pass"),
        "in use": (IMPORT, "", USE.strip()),
    }  # fmt: skip
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", BYSTANDER.format(before=before, between=between, during=during)],
            stdout=subprocess.PIPE, text=True,
        )
        for name, (before, between, during) in places.items()
    }  # fmt: skip
    printed = {name: process.communicate()[0] for name, process in processes.items()}
    assert "AutoNormal.locs.layer.weight" in printed["without"]
    assert "plain$$$weight" in printed["without"]
    assert len(set(printed.values())) == 1


def conjugate(copies):
    """y = Xw + noise with orthogonal columns, as several equal outputs: model, data, exact loc and scale of each output."""
    generator = torch.Generator().manual_seed(0)
    x, _ = torch.linalg.qr(torch.randn(40, 3, generator=generator))
    x = x * torch.tensor([8.0, 4.0, 2.0])
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.5 * torch.randn(40, 1, generator=generator)
    precision = (x**2).sum(0) / 0.25 + 1 / 0.49
    net = nn.Sequential(nn.Linear(3, copies, bias=False))
    model = pl.BayesianRegressor(net, pl.priors.normal(0.7), num_data=40, noise_scale=0.5)
    return model, x, y.expand(-1, copies), (x.mT @ y).squeeze(1) / 0.25 / precision, precision.rsqrt()


MASKS = {"dense": {}, "under a mask": {"0.weight": torch.tensor([[True, False, True]]).expand(100, 3).clone()}}


@pytest.mark.parametrize("loss", [pl.ELBO, Trace_ELBO])
@pytest.mark.parametrize("mask", MASKS)
def test_conjugate_regression_by_svi_with_an_optimizer_of_pyro_meets_the_exact_posterior(loss, mask):
    """Each output's weights are a draw of their own, so that a step of 4 particles is worth 400 of one regression."""
    model, x, y, loc, scale = conjugate(100)
    guide = pl.guides.mean_field(model, init_scale=0.1)
    mean = dict.fromkeys(guide.state_dict(), torch.tensor(0.0))
    with pl.handlers.sparsify(MASKS[mask]):
        for particles, steps, lr in ((1, 200, 0.04), (2, 150, 0.01), (4, 80, 0.005)):
            svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss=loss(num_particles=particles))
            for _ in range(steps):
                svi.step(x, y)
                if particles == 4:  # the mean log-scale of all outputs then has a standard error of 0.7/√32000
                    mean = {name: mean[name] + value / steps for name, value in guide.state_dict().items()}
    guide.load_state_dict(mean)
    posterior, kept = pl.posterior(guide), MASKS[mask].get("0.weight", torch.ones(1, 3, dtype=torch.bool))[0]
    locs, scales = posterior.loc["0.weight"][:, kept], posterior.scale["0.weight"][:, kept]
    torch.testing.assert_close(locs.mean(0), loc[kept], rtol=0.02, atol=0.005)
    torch.testing.assert_close(scales.log().mean(0).exp(), scale[kept], rtol=0.02, atol=0)
    assert ((locs - loc[kept]).abs() < 0.25 * scale[kept]).all(), "no output is elsewhere"
    assert (scales.log() - scale[kept].log()).abs().max() < 0.25


@pytest.mark.parametrize("kind", [None, AutoNormal, AutoDiagonalNormal])
def test_svi_trains_the_guide_and_the_networks_own_parameters_without_the_global_store(kind):
    model = pl.BayesianClassifier(TinyNet(), num_data=4, kl_temperature=0.1)
    guide = pl.guides.mean_field(model) if kind is None else pl.guides.auto(kind, model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=pl.ELBO())
    before = {n: p.detach().clone() for n, p in (*model.named_parameters(), *guide.named_parameters())}
    assert {"net.bn.weight", "net.bn.bias"} < before.keys()
    assert svi.step(torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])) > 0
    after = dict((*model.named_parameters(), *guide.named_parameters()))
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]
    copy.deepcopy(model)
    pickle.dumps(dict(model.named_parameters()))


def test_a_guide_of_pyro_keeps_its_parameters_where_pyro_does_and_the_network_its_own():
    model = pl.BayesianClassifier(TinyNet(), num_data=4)
    guide = AutoNormal(model)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO()).step(
        torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    )
    names = set(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert names
    assert all(name.startswith("AutoNormal.") for name in names)


def test_our_guide_of_a_users_model_leaves_that_models_parameters_in_the_store():
    class Users(PyroModule):
        def __init__(self):
            super().__init__()
            self.centre = PyroParam(torch.tensor(2.0))
            self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

        def forward(self, y):
            pyro.sample("y", dist.Normal(self.centre + self.weight.sum(), 1.0).expand(y.shape).to_event(1), obs=y)

    for build in (pl.guides.mean_field, lambda model, _, y: pl.guides.auto(AutoNormal, model, 0.01, y)):
        model = Users()
        guide = build(model, 0.01, torch.ones(5))
        SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=pl.ELBO()).step(torch.ones(5))
        names = set(pyro.get_param_store().keys())
        pyro.clear_param_store()
        assert names == {"centre"}
        assert not torch.equal(model.centre, torch.tensor(2.0))


def test_the_setting_is_what_its_owner_made_it():
    model = pl.BayesianClassifier(nn.Linear(2, 2), num_data=4)
    for value in (True, False):
        with pyro.settings.context(module_local_params=value):
            model(torch.ones(4, 2))
            with pytest.raises(RuntimeError, match="mat1"):
                model(torch.ones(4, 3))
            assert pyro.settings.get("module_local_params") is value
