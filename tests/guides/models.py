"""Small models for guides: a network, and sites in plates, in loops and over other supports than the real line."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_lottery as pl


def linear():
    """A classifier of one linear layer, for [n, 1, 4, 4] images."""
    return pl.BayesianClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), num_data=60, kl_temperature=0.1)


def nested():
    """Plates within each other; the inner one has events of two numbers."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 4, dim=-2):
        a = pyro.sample("a", dist.Normal(w.sum(-1, keepdim=True), 1.0))
        with pyro.plate("columns", 5, dim=-1):
            b = pyro.sample("b", dist.Normal(a.unsqueeze(-1) + torch.zeros(5, 2), 2.0).to_event(1))
            pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=torch.ones(4, 5))


def vectorizable():
    """The latent sites of ``nested``."""
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 4, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
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
