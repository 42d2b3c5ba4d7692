"""Priors with a scale that is learned, in every way to write one."""

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn


class LearnedScale(nn.Module):
    """A prior with parameters of its own: the scale's logarithm, shared by all sites."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-0.7))

    def forward(self, site, shape):
        return dist.Normal(0.0, self.log_scale.exp())


class ConstrainedScale(PyroModule):
    """The same in Pyro's manner."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(-0.7).exp(), dist.constraints.positive)

    def forward(self, site, shape):
        return dist.Normal(0.0, self.scale)


def learnable(kind):
    """A prior N(0, s²) with s = e^-0.7 to be learned, its parameter, and s as a function of that."""
    if kind == "module":
        module = LearnedScale()
        return module, module.log_scale, torch.exp
    if kind == "PyroModule":
        module = ConstrainedScale()
        return module, module.scale_unconstrained, torch.exp
    if kind == "function":
        log_scale = nn.Parameter(torch.tensor(-0.7))
        return (lambda site, shape: dist.Normal(0.0, log_scale.exp())), log_scale, torch.exp
    scale = nn.Parameter(torch.tensor(-0.7).exp())
    prior = dist.Normal(0.0, scale)
    return (prior if kind == "distribution" else lambda site, shape: dist.Normal(0.0, scale)), scale, lambda s: s


KINDS = ("distribution", "leaf", "function", "module", "PyroModule")
