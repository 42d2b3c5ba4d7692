"""One Bayesian training step with the peer libraries torch-blue and bayesian-torch, to compare with ours.

The random parameters are the weights and biases of Linear and Conv layers, as in pyro_lottery; normalisation layers,
class tokens and position embeddings stay deterministic. Posterior means start at the network's own weights.
The loss is nll + KL(q || N(0, 1)) / num_data, the optimiser torch.optim.Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from bayesian_torch.layers.base_variational_layer import BaseVariationalLayer_
from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch_blue import vi
from torch_blue.vi.distributions import Categorical, MeanFieldNormal
from torch_blue.vi.utils.convert import ban_convert

Step = Callable[[], Tensor]  # one training step -> its loss, detached and still on the device
Context = Callable[[], AbstractContextManager[Any]]  # what the forward pass runs in, such as autocast
INIT_SCALE = 0.01  # initial scale relative to the weights'; it affects only the first losses


def _training_step(net: nn.Module, loss: Callable[[], Tensor], context: Context) -> Step:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        with context():
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach().as_subclass(Tensor)

    return step


def torch_blue_step(plain: nn.Module, x: Tensor, y: Tensor, num_data: int, kl: str, context: Context) -> Step:
    """``kl="sampled"`` is the loss of the library's quickstart, log q(w) - log p(w); ``"analytic"`` is its closed form.

    The latter also makes the library sample the outputs of Linear layers, not their weights (local reparameterisation).
    """
    plain.to(x.device)
    # Otherwise every other layer with parameters of its own would become random too, such as timm's LayerNorm.
    random = (nn.Linear, nn.modules.conv._ConvNd)
    ban_convert([type(m) for m in plain.modules() if m._parameters and not isinstance(m, random)])
    torch.func.replace_all_batch_norm_modules_(plain)  # vmap cannot update running statistics
    guide = MeanFieldNormal(std=INIT_SCALE * math.sqrt(2.0))  # times 1 / sqrt(fan_in), by the library
    vi.convert_to_vimodule(plain, keep_weights=True, variational_distribution=guide, prior=MeanFieldNormal(0.0, 1.0))
    # The outermost module draws the samples and gathers log-probabilities, so it must be one of the library's own.
    net = plain if isinstance(plain, vi.VIModule) else vi.VISequential(plain)
    net.return_log_probs = True  # a VISequential around a foreign module starts without; the analytic loss unsets it
    exact = {"analytic": True, "sampled": False}[kl]
    loss = partial(vi.AnalyticalKullbackLeiblerLoss, net) if exact else vi.KullbackLeiblerLoss
    criterion: nn.Module = loss(Categorical(), dataset_size=num_data)
    return _training_step(net, lambda: criterion(net(x, samples=1), y) / num_data, context)


def bayesian_torch_step(net: nn.Module, x: Tensor, y: Tensor, num_data: int, context: Context) -> Step:
    """The library's estimator by weight samples, ``Reparameterization``."""
    options = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    moped = {"moped_enable": True, "moped_delta": INIT_SCALE}  # here: start at the network's own weights
    dnn_to_bnn(net, options | moped | {"type": "Reparameterization"})
    net.to(x.device)
    for layer in net.modules():
        if isinstance(layer, BaseVariationalLayer_):
            layer.kl_div = partial(_kl_sum, layer.kl_div)

    def loss() -> Tensor:
        kl: Tensor = get_kl_loss(net)
        return F.cross_entropy(net(x), y) + kl / num_data

    return _training_step(net, loss, context)


def _kl_sum(kl_mean: Callable[..., Tensor], mu: Tensor, *args: Any) -> Tensor:
    return kl_mean(mu, *args) * mu.numel()  # the library averages a tensor's KL over its weights; the ELBO has the sum
