"""Priors by a formula: normal, Laplace, Student's t, a scale mixture, and one whose width follows the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from pyro_lottery.errors import UserError
from pyro_lottery.priors.by_site import Prior

# Pyro's guides map every site's support to the real line. Torch registers no such map for mixtures, so use that of the
# components.
for _registry in (torch.distributions.biject_to, torch.distributions.transform_to):
    _registry.register(
        torch.distributions.constraints.MixtureSameFamilyConstraint,
        lambda constraint, registry=_registry: registry(constraint.base_constraint),
    )


def normal(*loc_scale: float, scale: float | None = None) -> Prior:
    """N(loc, scale²) on every weight (paper §3); one number is the scale, two numbers are loc and scale.

    Raises ``UserError`` if scale is not greater than 0, or if there are more than two numbers.
    """
    loc, width = _loc_scale("normal", loc_scale, scale)
    return lambda site, shape: dist.Normal(torch.tensor(loc), torch.tensor(width))


def laplace(*loc_scale: float, scale: float | None = None) -> Prior:
    """Laplace(loc, scale) on every weight; one number is the scale, two numbers are loc and scale.

    Raises ``UserError`` if scale is not greater than 0, or if there are more than two numbers.
    """
    loc, width = _loc_scale("laplace", loc_scale, scale)
    return lambda site, shape: dist.Laplace(torch.tensor(loc), torch.tensor(width))


def student_t(scale: float = 1.0, df: float = 3.0) -> Prior:
    """Student's t distribution with ``df`` degrees of freedom, centred at 0, on every weight.

    Raises ``UserError`` if ``scale`` or ``df`` is not greater than 0.
    """
    _loc_scale("student_t", (scale,))
    _check_is_fixed("student_t (df)", (df,))
    if not df > 0:
        raise UserError(f"student_t prior: df must be greater than 0, got {df}")
    return lambda site, shape: dist.StudentT(torch.tensor(df), torch.tensor(0.0), torch.tensor(scale))


def mixture(scale: float = 1.0, narrow: float = 0.0025, weight: float = 0.5) -> Prior:
    """π·N(0, scale²) + (1 − π)·N(0, narrow²) on every weight, with π = ``weight``.

    This is the scale mixture of Bayes by Backprop (Blundell et al. 2015). Raises ``UserError`` if ``scale`` or ``narrow``
    is not greater than 0, or if ``weight`` is not between 0 and 1.
    """
    for name, value in (("scale", scale), ("narrow", narrow)):
        _loc_scale(f"mixture ({name})", (value,))
    _check_is_fixed("mixture (weight)", (weight,))
    if not 0 < weight < 1:
        raise UserError(f"mixture prior: weight must be between 0 and 1, got {weight}")
    shares, scales = torch.tensor([weight, 1 - weight]), torch.tensor([scale, narrow])
    return lambda site, shape: dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(torch.zeros(2), scales))


@dataclass(frozen=True)
class FanIn:
    """The prior :func:`fan_in`; a network gives it the number of inputs of layers whose shape [outputs, inputs, ...] does not tell it."""

    scale: float

    def __call__(self, site: str, shape: Size) -> dist.TorchDistribution:
        return self.of(shape[1:].numel() if len(shape) > 1 else 1)

    def of(self, inputs: int) -> dist.TorchDistribution:
        """The distribution of one weight of a layer with ``inputs`` inputs."""
        return dist.Normal(torch.tensor(0.0), torch.tensor(self.scale / inputs**0.5))


def fan_in(scale: float = 1.0) -> Prior:
    """N(0, scale²/fan_in) on weights, with the layer's number of inputs fan_in, and N(0, scale²) on biases.

    It keeps the size of activations similar across layers. A parameter with one dimension counts as a bias. Raises
    ``UserError`` if ``scale`` is not greater than 0.
    """
    _loc_scale("fan_in", (scale,))
    return FanIn(scale)


def _check_is_fixed(name: str, numbers: tuple[float, ...]) -> None:
    if any(isinstance(number, Tensor) and number.requires_grad for number in numbers):
        raise UserError(
            f"{name} prior: a parameter would be frozen at its value; to learn it, give a distribution, such as dist.Normal(0.0, parameter)"
        )


def _loc_scale(name: str, numbers: tuple[float, ...], named: float | None = None) -> tuple[float, float]:
    numbers = numbers if named is None else (*numbers, named)
    if len(numbers) > 2:
        raise UserError(f"{name} prior: expected (scale) or (loc, scale), got {len(numbers)} numbers")
    _check_is_fixed(name, numbers)
    loc, scale = (0.0, *numbers) if len(numbers) == 1 else (numbers or (0.0, 1.0))
    if not scale > 0:
        raise UserError(f"{name} prior: scale must be greater than 0, got {scale}")
    return float(loc), float(scale)
