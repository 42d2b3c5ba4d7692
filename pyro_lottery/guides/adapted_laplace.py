"""Laplace's approximation: a point that is trained first, and the Gaussian around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation, AutoMultivariateNormal
from pyro.ops.hessian import hessian
from torch import Tensor, nn

from pyro_lottery.errors import UserError
from pyro_lottery.guides.adapted import adapted
from pyro_lottery.guides.base import model_of
from pyro_lottery.guides.family import family
from pyro_lottery.guides.joint import AdaptedJoint, StockJoint
from pyro_lottery.guides.memory import check_memory
from pyro_lottery.handlers import left_out
from pyro_lottery.modes import evaluating
from pyro_lottery.threads import TURN


class StockLaplace(StockJoint):
    """AutoLaplaceApproximation, which is a point while it trains."""

    is_point = True

    def scales(self) -> dict[str, Tensor]:
        return {}


family.register(AutoLaplaceApproximation, StockLaplace)


class AdaptedLaplace(AdaptedJoint):
    """A point with :meth:`laplace_approximation` of the surviving weights, under the KL temperature."""

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> AutoGuide:
        """The Gaussian at loc with covariance T·H⁻¹, an AutoMultivariateNormal like one of :func:`guides.auto`.

        H is the Hessian of −log p(D|w) − T·log p(w) over the surviving weights, so that this is Laplace's approximation
        of p(w)·p(D|w)^(1/T). ``args`` are the model's: the inputs and targets of the data. The network is in eval mode,
        as in predictions. Raises ``UserError`` where H is not positive definite, so that loc is no maximum, and where H
        is larger than the memory.
        """
        check_memory(AutoMultivariateNormal, [len(self.loc)], self.loc.device)
        kept = self.surviving()
        with TURN, self._evaluating():
            precision = self._hessian(*args, **kwargs) / self._temperature
        index = torch.arange(len(precision), device=precision.device) if kept is None else kept.nonzero().squeeze(1)
        try:
            inverse = torch.linalg.cholesky(precision[index[:, None], index]).cholesky_inverse()
            tril = torch.linalg.cholesky(inverse)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                "the Hessian at this guide's loc is not positive definite, so loc is not a maximum; train it further"
            ) from error
        found = adapted(AutoMultivariateNormal, AdaptedJoint)(self.model)
        with TURN, poutine.block(), left_out(), self._evaluating():
            found._setup_prototype(*args, **kwargs)
        found.places = self.places
        found.to(self.loc.device)
        with torch.no_grad():
            found.loc.copy_(self.loc if kept is None else torch.where(kept, self.loc, 0.0))
            found.scale = torch.ones_like(self.loc).index_copy(0, index, tril.diagonal())
            unit = torch.eye(len(precision), dtype=tril.dtype, device=tril.device)
            unit[index[:, None], index] = tril / tril.diagonal()[:, None]
            found.scale_tril = unit
        return found

    def _hessian(self, *args: Any, **kwargs: Any) -> Tensor:
        """H [n, n] at loc, over all weights."""
        drawn = poutine.trace(self).get_trace(*args, **kwargs)
        model = poutine.trace(poutine.replay(self.model, trace=drawn)).get_trace(*args, **kwargs)
        return hessian(drawn.log_prob_sum() - model.log_prob_sum(), self.loc).detach()

    def _evaluating(self) -> AbstractContextManager[None]:
        model = model_of(self)
        return evaluating(model) if isinstance(model, nn.Module) else nullcontext()
