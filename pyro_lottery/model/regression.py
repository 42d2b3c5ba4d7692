"""Regression: a Normal likelihood with known, learned or predicted noise."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.model import BayesianNetwork
from pyro_lottery.model.layers import outputs_of
from pyro_lottery.priors import AnyPrior

KINDS = ("learned", "predicted")
"""Kinds of noise that are named; a given scale is another kind."""


class BayesianRegressor(BayesianNetwork):
    """A ``BayesianNetwork`` whose outputs [n, d] or [n] are the means of a Normal likelihood.

    ``noise_scale`` is the standard deviation of the targets around their means, in the targets' unit:

    - a positive number, or a tensor [d] with one number per output: known;
    - ``"learned"``: one scale per output, learned together with the weights, starting at 1;
    - an ``nn.Parameter`` [d]: learned, starting at its value;
    - ``"predicted"``: the network predicts it for each example; the first d of its outputs [n, 2d] are the means, the
      others the logarithms of the scales.

    ``outputs`` is d for ``"learned"``; the default is the number of outputs of the network's last layer. If the output for
    an example has several dimensions, ``outputs`` is the shape of the scales: ``(channels, 1)`` for outputs
    [n, channels, time] shares each channel's scale over time. Raises ``UserError`` if ``noise_scale`` is not positive, or
    if ``outputs`` is given without ``"learned"``.
    """

    def __init__(
        self,
        net: nn.Module,
        prior: AnyPrior | None = None,
        *,
        num_data: int,
        noise_scale: float | Tensor | str,
        outputs: int | tuple[int, ...] | None = None,
        kl_temperature: float = 1.0,
    ):
        noise: Any = _checked(noise_scale)  # before the network is changed
        if outputs is not None and noise != "learned":
            raise UserError('outputs is only for noise_scale="learned", as its number of scales')
        d = outputs_of(net) if outputs is None else outputs
        super().__init__(net, prior, num_data=num_data, kl_temperature=kl_temperature)
        self._noise, self._outputs_said = noise if isinstance(noise, str | float) else "given", outputs is not None
        if isinstance(noise, nn.Parameter):
            self.own_noise_scale = noise
        elif isinstance(noise, Tensor):
            # Not in the state dict: it is part of the model's definition, like a number.
            self.register_buffer("own_noise_scale", noise, persistent=False)
        elif noise == "learned":
            like: Any = next(iter(self.initial_values().values()))
            self.log_noise_scale = nn.Parameter(like.new_zeros(d))

    @property
    def noise_scale(self) -> float | Tensor:
        """The current standard deviation of the noise: a number, or a tensor [d] with one number per output.

        Raises ``UserError`` if the network predicts it.
        """
        if self._noise == "predicted":
            raise UserError("the network predicts a noise_scale for each example; use pl.predictive")
        return self._scale() if isinstance(self._noise, str) else self._noise

    def _scale(self) -> Tensor:
        return self.log_noise_scale.exp() if self._noise == "learned" else self.own_noise_scale

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        scale: Any = self._noise
        if scale == "predicted":
            if output.ndim < 2 or output.shape[1] % 2:
                raise UserError(
                    f"with a predicted noise_scale the outputs must be [n, 2d], d means and d log-scales, got {tuple(output.shape)}"
                )
            output, log_scale = output.chunk(2, dim=1)
            scale = log_scale.exp()
        elif isinstance(scale, str):
            scale = self._fitted(self._scale().to(output.dtype), output)
        return dist.Normal(output, scale).to_event(output.ndim - 1)

    def _fitted(self, scale: Tensor, output: Tensor) -> Tensor:
        """``scale`` in a shape that broadcasts to ``output``; raises ``UserError`` if it does not fit this output."""
        one, own = tuple(output.shape[1:]), tuple(scale.shape)
        if own == (1,) and one == ():
            return scale.reshape(())
        shared = self._noise == "given" or self._outputs_said  # broadcasting is intended
        alike = len(own) == len(one) and all(s in (1, o) if shared else s == o for s, o in zip(own, one, strict=True))
        if not alike and not (shared and own == ()):
            said = (
                f"give outputs={one[0] if len(one) == 1 else one}"
                if self._noise == "learned"
                else "give one scale per output"
            )
            raise UserError(f"the output for one example has shape {one}, but noise_scale has shape {own}; {said}")
        return scale


def _checked(noise_scale: Any) -> float | Tensor | str:
    """The given noise as a name in ``KINDS``, a number, a parameter or a copied tensor; raises ``UserError`` if it is invalid."""
    if isinstance(noise_scale, str):
        if noise_scale not in KINDS:
            raise unknown("noise_scale", noise_scale, KINDS)
        return noise_scale
    try:
        scale = torch.as_tensor(noise_scale)
        positive = bool(((scale > 0) & scale.isfinite()).all()) and scale.numel() > 0 and scale.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        positive = False
    if not positive:
        raise UserError(
            f"noise_scale must be positive and finite (or one of {', '.join(KINDS)}), got {' '.join(str(noise_scale).split())}"
        )
    if isinstance(noise_scale, nn.Parameter):
        return noise_scale
    if scale.requires_grad:
        raise UserError("a noise_scale that requires a gradient must be an nn.Parameter")
    if scale.ndim == 0:
        return float(noise_scale)
    return scale.detach().clone() if scale.is_floating_point() else scale.to(torch.get_default_dtype())
