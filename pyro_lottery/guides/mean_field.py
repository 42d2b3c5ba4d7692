"""The mean-field family: independent Normal weights (paper §3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ExpTransform
from torch import Tensor, nn

from pyro_lottery.distributions import Draw, SiteNormal
from pyro_lottery.errors import UserError
from pyro_lottery.guides.flat import FlatGuide
from pyro_lottery.guides.places import Select
from pyro_lottery.guides.preimage import preimage
from pyro_lottery.kernels import Layout
from pyro_lottery.kernels.layout import flatten
from pyro_lottery.types import Posterior

_EXP = ExpTransform()


class MeanField(FlatGuide):
    """q(w) = Π N(w; loc, scale²): one Normal site per weight tensor, scale = exp(log_scale) (paper §3).

    The family is that of Pyro's AutoNormal, but with two flat parameters, so that all samples and gradients take one pass
    over memory. Under ``sparsify``, only the weights that the mask keeps are drawn; ``compressed`` trains only those.
    Raises ``UserError`` if ``init_scale`` or ``max_scale`` is not greater than 0.
    """

    flat: ClassVar[tuple[str, ...]] = ("loc", "log_scale")

    def __init__(
        self,
        model: Callable[..., Any],
        init_scale: float,
        *prototype_args: Any,
        create_plates: Any = None,
        max_scale: float | None = None,
        train_scale: bool = True,
    ):
        super().__init__(model, *prototype_args, create_plates=create_plates)
        if not init_scale > 0:
            raise UserError(f"init_scale must be greater than 0, got {init_scale}")
        if max_scale is not None and not max_scale > 0:
            raise UserError(f"max_scale must be greater than 0, got {max_scale}")
        kaiming = getattr(model, "kaiming_scale", {})
        self.max_scale = max_scale
        self.check_scales({name: torch.tensor(init_scale * kaiming.get(name, 1.0)) for name in self.shapes})
        scales = [
            torch.full((size,), init_scale * kaiming.get(name, 1.0))
            for name, size in zip(self.shapes, self.layout.sizes, strict=True)
        ]
        self.log_scale = nn.Parameter(torch.cat(scales).to(self.loc).log(), requires_grad=train_scale)

    def scales(self) -> dict[str, Tensor]:
        return self.unpack(self.bounded(self.log_scale).exp())

    @torch.no_grad()
    def set_(self, posterior: Posterior) -> None:
        assert posterior.scale is not None  # as Family.takes_scales asks
        self.check_scales(posterior.scale)
        super().set_(posterior)
        flat = torch.cat([flatten(posterior.scale[name]) for name in self.shapes]).to(self.log_scale)
        self.log_scale.copy_(preimage(_EXP, flat))

    def check_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Raise ``UserError`` if a site has a scale above ``max_scale``; ``scales`` have the sites' shapes."""
        for name, scale in scales.items():
            if self.max_scale is not None and bool((scale > self.max_scale).any()):
                raise UserError(
                    f"the scale of {name!r} is to be {float(scale.max()):.4g}, above max_scale {self.max_scale:.4g}"
                )

    def bounded(self, log_scale: Tensor) -> Tensor:
        """``log_scale`` with every scale limited to ``max_scale``; the shape stays the same."""
        return log_scale if self.max_scale is None else _AtMost.apply(log_scale, math.log(self.max_scale))

    def under_masks(self) -> tuple[Layout, list[Tensor]]:
        layout, (loc, log_scale, *more) = super().under_masks()
        return layout, [loc, self.bounded(log_scale), *more]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site of the model; returns the values by site, with the sites' shapes."""
        layout, (loc, log_scale, *_) = self.under_masks()
        draw = Draw(loc, log_scale, layout)

        def normal(number: int, select: Select) -> dist.TorchDistribution:
            return SiteNormal(draw, number) if select is None else draw.part(number, select)

        return self.draw(normal, *args, **kwargs)


class _AtMost(torch.autograd.Function):
    """min(x, bound), whose gradient is 0 only where descent would raise x further: what is at the bound can return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x >= bound)
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0] & (grad < 0), 0.0, grad), None


def mean_field(
    model: Callable[..., Any],
    init_scale: float = 0.01,
    *prototype_args: Any,
    create_plates: Any = None,
    max_scale: float | None = None,
    train_scale: bool = True,
) -> MeanField:
    """A mean-field Normal guide (paper §3): loc from the network's own initialisation, scale = ``init_scale`` times
    the Kaiming scale √(2/fan_in) of the layer.

    ``model`` is a network of this package or any Pyro model of continuous sites, with plates and supports as
    :class:`FlatGuide` says. ``prototype_args`` are arguments to trace a model that cannot run without data.
    ``create_plates`` is as in Pyro. No scale exceeds ``max_scale``. With ``train_scale=False`` the scales stay fixed.
    Raises ``UserError`` for scales that are not positive or above ``max_scale``, and for sites that are not continuous.
    """
    options: Any = {"create_plates": create_plates, "max_scale": max_scale, "train_scale": train_scale}
    return MeanField(model, init_scale, *prototype_args, **options)
